"""A report as HTML, terminal text or Markdown."""
