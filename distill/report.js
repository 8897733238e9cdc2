"use strict";
// Draws the page's charts: puts the colours of the light or dark ground into each figure and hands it to Plotly.
(() => {
  const PALETTES = {
    light: {
      blue: "#0072b2", orange: "#c77c02", green: "#00805b", purple: "#b5568c", sky: "#56b4e9", red: "#c94f00",
      yellow: "#a89b00", grey: "#7a828a", ink: "#1b2126", ground: "#ffffff", grid: "#e3e7ea",
      heat: [[0, "#f3f6f8"], [1, "#4fa3d1"]],
    },
    dark: {
      blue: "#4aa8e0", orange: "#e69f00", green: "#2dbb8f", purple: "#d98bb5", sky: "#8fd0f5", red: "#f0834a",
      yellow: "#f0e442", grey: "#98a2ab", ink: "#e6eaed", ground: "#1b2126", grid: "#343d45",
      heat: [[0, "#232b32"], [1, "#2f7fb3"]],
    },
  };
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const narrow = window.matchMedia("(max-width: 640px)");
  const finger = window.matchMedia("(pointer: coarse)");
  const chosen = {};

  // The same tree with the colour in place of every "@name".
  const coloured = (tree, palette) => {
    if (typeof tree === "string") {
      return tree.startsWith("@") && Object.hasOwn(palette, tree.slice(1)) ? palette[tree.slice(1)] : tree;
    }
    if (Array.isArray(tree)) return tree.map((value) => coloured(value, palette));
    if (tree === null || typeof tree !== "object") return tree;
    return Object.fromEntries(Object.entries(tree).map(([key, value]) => [key, coloured(value, palette)]));
  };

  const styled = (layout, palette) => {
    const axis = {
      gridcolor: palette.grid, zerolinecolor: palette.grid, linecolor: palette.grid, automargin: true,
      tickfont: { size: 12 }, fixedrange: finger.matches,
    };
    const title = (given) => given.title && given.title.text
      ? { title: { ...given.title, font: { size: 13 }, standoff: 8 } } : {};
    const whole = {
      font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: palette.ink },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      margin: { l: 8, r: 12, t: 8, b: 8 },
      legend: { orientation: "h", x: 0, y: 1.03, yanchor: "bottom", font: { size: 12 } },
      hovermode: "x unified",
      hoverlabel: { bgcolor: palette.ground, bordercolor: palette.grid, font: { color: palette.ink, size: 12 } },
      // A finger that scrolls the page must not draw a zoom box.
      dragmode: finger.matches ? false : "zoom",
      ...layout,
    };
    for (const name of Object.keys(layout).filter((key) => /^[xy]axis\d?$/.test(key))) {
      whole[name] = { ...axis, ...layout[name], ...title(layout[name]) };
    }
    return whole;
  };

  const draw = (place) => {
    const palette = PALETTES[dark.matches ? "dark" : "light"];
    const figure = coloured(figures[place.dataset.chart], palette);
    const options = { responsive: true, displaylogo: false, displayModeBar: narrow.matches ? false : "hover",
      modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
      toImageButtonOptions: { filename: place.dataset.chart, scale: 2 } };
    const { choices } = figure;
    return Plotly.react(place, figure.data, styled(figure.layout, palette), options).then(() => {
      const choice = choices && choices[chosen[place.dataset.chart] || 0];
      return choice ? Plotly.update(place, choice.data, choice.layout) : undefined;
    });
  };

  const addButtons = (place) => {
    const key = place.dataset.chart;
    const { choices } = figures[key];
    if (!choices) return;
    const row = document.createElement("div");
    row.className = "choices";
    row.setAttribute("role", "group");
    row.setAttribute("aria-label", "What the chart shows");
    choices.forEach((choice, number) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = choice.label;
      button.setAttribute("aria-pressed", String(number === 0));
      button.addEventListener("click", () => {
        chosen[key] = number;
        for (const other of row.children) other.setAttribute("aria-pressed", String(other === button));
        draw(place);
      });
      row.append(button);
    });
    place.before(row);
  };

  const places = [...document.querySelectorAll("[data-chart]")];
  const drawAll = () => Promise.all(places.map(draw));
  places.forEach(addButtons);
  dark.addEventListener("change", drawAll);
  narrow.addEventListener("change", drawAll);
  drawAll().then(() => { document.documentElement.dataset.drawn = String(places.length); });
})();
