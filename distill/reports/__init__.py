"""Reports: a run's own records, or bare weights, as terminal text, JSON and one offline HTML
page."""
