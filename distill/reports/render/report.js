"use strict";
// Draws the page's charts: puts the colours of the light or dark ground into each figure and hands it to Plotly.
(() => {
  const PALETTES = {
    light: {
      blue: "#0072b2", orange: "#c77c02", green: "#00805b", purple: "#b5568c", sky: "#56b4e9", red: "#c94f00",
      yellow: "#a89b00", grey: "#7a828a", ink: "#1b2126", ground: "#ffffff", grid: "#e3e7ea",
      heat: [[0, "#f3f6f8"], [1, "#4fa3d1"]], deep: [[0, "#e8eff4"], [0.5, "#5aa5d0"], [1, "#08487a"]],
      change: [[0, "#0072b2"], [0.5, "#f6f6f4"], [1, "#c94f00"]],
    },
    dark: {
      blue: "#4aa8e0", orange: "#e69f00", green: "#2dbb8f", purple: "#d98bb5", sky: "#8fd0f5", red: "#f0834a",
      yellow: "#f0e442", grey: "#98a2ab", ink: "#e6eaed", ground: "#1b2126", grid: "#343d45",
      heat: [[0, "#232b32"], [1, "#2f7fb3"]], deep: [[0, "#1f2a33"], [0.5, "#2f7fb3"], [1, "#c2e6ff"]],
      change: [[0, "#4aa8e0"], [0.5, "#262d34"], [1, "#f0834a"]],
    },
  };
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const narrow = window.matchMedia("(max-width: 640px)");
  const finger = window.matchMedia("(pointer: coarse)");
  const mouse = window.matchMedia("(hover: hover)"); // without one Plotly would lay its buttons over the chart for good
  const chosen = {};

  // A colour between two of the form "#rrggbb"; share 0 is the first.
  const mixed = (first, second, share) => {
    const part = (colour, place) => parseInt(colour.slice(1 + 2 * place, 3 + 2 * place), 16);
    const one = (place) => Math.round((1 - share) * part(first, place) + share * part(second, place));
    return `rgb(${one(0)}, ${one(1)}, ${one(2)})`;
  };

  // The same tree with the colour in place of every "@name".
  const coloured = (tree, palette) => {
    if (typeof tree === "string") {
      if (tree.startsWith("@mix:")) return mixed(palette.blue, palette.orange, Number(tree.slice(5)));
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
      modebar: { bgcolor: "rgba(0,0,0,0)", color: palette.grey, activecolor: palette.ink },
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
    const options = { responsive: true, displaylogo: false, displayModeBar: narrow.matches || !mouse.matches ? false : "hover",
      modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
      toImageButtonOptions: { filename: place.dataset.chart, scale: 2 } };
    return Plotly.react(place, figure.data, styled(figure.layout, palette), options).then(() => {
      const change = changes(figure)[pressed(place.dataset.chart).join(",")];
      return change ? Plotly.update(place, change.data, change.layout) : undefined;
    });
  };

  // The labels of each row of buttons, and what each combination of pressed buttons changes.
  const rows = (figure) => figure.groups || (figure.choices ? [figure.choices.map((choice) => choice.label)] : []);
  const changes = (figure) => figure.combined
    || Object.fromEntries((figure.choices || []).map((choice, number) => [String(number), choice]));
  const pressed = (key) => chosen[key] || (chosen[key] = rows(figures[key]).map(() => 0));

  const addRow = (place, key, labels, group) => {
    const row = document.createElement("div");
    row.className = "choices";
    row.setAttribute("role", "group");
    row.setAttribute("aria-label", group ? "Which part of it the chart shows" : "What the chart shows");
    labels.forEach((label, number) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = label;
      button.setAttribute("aria-pressed", String(number === 0));
      button.addEventListener("click", () => {
        pressed(key)[group] = number;
        for (const other of row.children) other.setAttribute("aria-pressed", String(other === button));
        draw(place);
      });
      row.append(button);
    });
    place.before(row);
  };

  const addButtons = (place) => {
    const key = place.dataset.chart;
    rows(figures[key]).forEach((labels, group) => addRow(place, key, labels, group));
  };

  const places = [...document.querySelectorAll("[data-chart]")];
  const drawAll = () => Promise.all(places.map(draw));
  places.forEach(addButtons);
  dark.addEventListener("change", drawAll);
  narrow.addEventListener("change", drawAll);
  drawAll().then(() => { document.documentElement.dataset.drawn = String(places.length); });
})();
