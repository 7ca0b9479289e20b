"use strict";
(() => {
  // Okabe and Ito's colours, darkened or lightened until each stands out from its background by 3 to 1 or more.
  const THEMES = {
    light: {
      series: ["#0072b2", "#c24e00", "#00805c", "#a8457f", "#8a6400", "#4659a8", "#5f6b76", "#7d2e2e"],
      text: "#1b1f24", muted: "#69727d", grid: "#e1e5ea", bg: "#ffffff", mid: "#f3f3f3", raised: "#ffffff",
    },
    dark: {
      series: ["#56b4e9", "#ff9a52", "#2fc39a", "#e49bc3", "#f0e442", "#a3b3ff", "#b4bec8", "#f08a8a"],
      text: "#e8eaec", muted: "#96a0aa", grid: "#333a41", bg: "#14171a", mid: "#4a5158", raised: "#1e2327",
    },
  };
  const root = document.documentElement;
  const prefersDark = matchMedia("(prefers-color-scheme: dark)");
  const charts = new Map();
  let printing = false;

  const theme = () => {
    if (printing) return "light";
    return root.dataset.theme || (prefersDark.matches ? "dark" : "light");
  };

  function colour(token) {
    const [name, transparency] = token.slice(1).split(":");
    const found = /^\d$/.test(name) ? THEMES[theme()].series[Number(name)] : THEMES[theme()][name];
    if (transparency === undefined || found === undefined) return found;
    const parts = [1, 3, 5].map((at) => parseInt(found.slice(at, at + 2), 16));
    return `rgba(${parts.join(",")},${transparency})`;
  }

  // Under these keys stand names, which are anybody's, and figures; a name that looks like a token is none.
  const NAMES = new Set(["text", "ticktext", "name", "customdata", "hovertemplate", "x", "y", "z", "categoryarray"]);
  function resolved(value, key) {
    if (NAMES.has(key)) return value;
    if (typeof value === "string") return value.startsWith("@") ? colour(value) : value;
    if (Array.isArray(value)) return value.map((item) => resolved(item));
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([name, item]) => [name, resolved(item, name)]));
  }

  function layoutOf(chart, width) {
    const own = resolved(chart.told.layout);
    const narrow = width < 520;
    const axis = { gridcolor: colour("@grid"), zerolinecolor: colour("@grid"), linecolor: colour("@muted") };
    const layout = {
      ...own,
      width,
      height: chart.told.height,
      paper_bgcolor: colour("@bg"),
      plot_bgcolor: colour("@bg"),
      font: { family: getComputedStyle(document.body).fontFamily, size: narrow ? 11 : 12, color: colour("@text") },
      margin: { l: narrow ? 44 : 64, r: 16, t: 12, b: 48, ...(own.margin || {}) },
      hoverlabel: { bgcolor: colour("@raised"), bordercolor: colour("@muted"), font: { color: colour("@text") }, namelength: -1 },
      hovermode: "closest",
      showlegend: false,
      dragmode: matchMedia("(pointer: coarse)").matches || narrow ? false : "zoom",
      xaxis: { ...axis, ...(own.xaxis || {}) },
      yaxis: { ...axis, automargin: true, ...(own.yaxis || {}) },
    };
    if (chart.view !== null) layout.xaxis = { ...axis, ...resolved(chart.told.views[chart.view].axis) };
    if (layout.xaxis.title) layout.xaxis.title = { standoff: 10, ...layout.xaxis.title };
    if (narrow && chart.told.labels.length) layout.yaxis.ticktext = chart.told.labels;
    return layout;
  }

  function dataOf(chart) {
    const traces = resolved(chart.told.traces);
    return traces.map((trace, at) => {
      if (chart.view !== null) trace.x = chart.told.views[chart.view].x[at];
      if (trace.colorbar) trace.colorbar = { ...trace.colorbar, outlinewidth: 0, tickcolor: colour("@muted") };
      return { ...trace, visible: chart.visible[at] };
    });
  }

  const SETTINGS = { displayModeBar: false, responsive: false, scrollZoom: false, doubleClick: "reset" };

  function draw(chart) {
    const width = printing ? 660 : Math.floor(chart.plot.clientWidth);
    if (!width) return;
    chart.plot.style.height = `${chart.told.height}px`;
    Plotly.react(chart.plot, dataOf(chart), layoutOf(chart, width), SETTINGS);
    drawLegend(chart);
  }

  const DASH = { dash: "6 3", dot: "2 3", dashdot: "6 3 2 3", longdash: "9 4", longdashdot: "9 3 2 3" };
  const SHAPES = {
    circle: "M11 3a5 5 0 1 0 .01 0z", square: "M6 3h10v10H6z", diamond: "M11 2l6 6-6 6-6-6z", "triangle-up": "M11 2l6 11H5z",
    "triangle-down": "M11 14l6-11H5z", cross: "M9 2h4v4h4v4h-4v4H9v-4H5V6h4z", x: "M6 4l2-2 3 3 3-3 2 2-3 4 3 4-2 2-3-3-3 3-2-2 3-4z",
    star: "M11 1l2 5h5l-4 3 2 6-5-4-5 4 2-6-4-3h5z",
  };

  function swatch(trace) {
    const ns = "http://www.w3.org/2000/svg";
    const svg = document.createElementNS(ns, "svg");
    for (const [name, value] of Object.entries({ width: 22, height: 16, "aria-hidden": "true" })) svg.setAttribute(name, value);
    const add = (kind, attributes) => {
      const shape = document.createElementNS(ns, kind);
      for (const [name, value] of Object.entries(attributes)) shape.setAttribute(name, value);
      svg.append(shape);
    };
    const marker = trace.marker || {};
    if (trace.type === "bar") add("rect", { x: 4, y: 2, width: 14, height: 12, fill: marker.color });
    if (trace.type === "scatter" && trace.mode.includes("lines")) {
      add("line", { x1: 0, x2: 22, y1: 8, y2: 8, stroke: trace.line.color, "stroke-width": 2, "stroke-dasharray": DASH[trace.line.dash] || "" });
    }
    if (trace.type === "scatter" && trace.mode.includes("markers")) {
      const symbol = marker.symbol || "circle";
      const open = symbol.endsWith("-open");
      const edge = open ? marker.color : (marker.line && marker.line.color) || "none";
      add("path", { d: SHAPES[symbol.replace("-open", "")] || SHAPES.circle, fill: open ? "none" : marker.color, stroke: edge, "stroke-width": open ? 2 : 1 });
    }
    return svg;
  }

  function plain(escaped) {
    return escaped.replace(/&lt;/g, "<").replace(/&gt;/g, ">").replace(/&amp;/g, "&");
  }

  // A legend of buttons instead of plotly's: it wraps on a phone, and a keyboard and a screen reader can use it.
  function drawLegend(chart) {
    const shown = resolved(chart.told.traces)
      .map((trace, at) => ({ trace, at }))
      .filter(({ trace }) => trace.showlegend !== false && trace.type !== "heatmap");
    if (shown.length < 2 && !chart.told.traces.some((trace) => trace.type === "heatmap")) return;
    if (chart.legend.childElementCount) {
      shown.forEach(({ trace }, place) => chart.legend.children[place].firstChild.replaceWith(swatch(trace)));
      return;
    }
    for (const { trace, at } of shown) {
      const button = document.createElement("button");
      button.type = "button";
      button.append(swatch(trace), plain(trace.name));
      button.setAttribute("aria-pressed", "true");
      button.addEventListener("click", () => {
        const on = button.getAttribute("aria-pressed") !== "true";
        button.setAttribute("aria-pressed", String(on));
        const group = chart.told.traces[at].legendgroup;
        chart.told.traces.forEach((other, index) => {
          if (index === at || (group !== undefined && other.legendgroup === group)) chart.visible[index] = on;
        });
        draw(chart);
      });
      chart.legend.append(button);
    }
  }

  function save(name, blob) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }

  function cell(text) {
    // A spreadsheet takes what begins like this for a formula, and names of clients are anybody's.
    const safe = /^[=+@\t\r-]/.test(text) && !/^[-+]?[\d.]+(e[-+]?\d+)?$/i.test(text) ? `'${text}` : text;
    return /[",\n\r]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
  }

  function csv(table) {
    return [...table.rows].map((row) => [...row.cells].map((item) => cell(item.textContent)).join(",")).join("\r\n") + "\r\n";
  }

  function picture(chart, format) {
    const layout = { ...layoutOf(chart, 900), showlegend: chart.legend.childElementCount > 0 };
    layout.title = { text: chart.figure.querySelector("h3, h4").textContent.replace(/&/g, "&amp;").replace(/</g, "&lt;"), x: 0.02 };
    layout.margin = { ...layout.margin, t: layout.margin.t + 44 };
    layout.legend = { orientation: "h", y: -0.18 };
    layout.height += 90;
    const options = { format, width: 900, height: layout.height, scale: format === "png" ? 2 : 1, filename: chart.figure.id };
    return Plotly.downloadImage({ data: dataOf(chart), layout }, options);
  }

  function prepare(figure) {
    const told = JSON.parse(figure.querySelector("script").textContent);
    const chart = {
      figure, told,
      plot: figure.querySelector(".plot"),
      legend: figure.querySelector(".legend"),
      visible: told.traces.map(() => true),
      view: told.views.length ? 0 : null,
    };
    charts.set(figure.id, chart);
    figure.querySelectorAll(".views button").forEach((button, at, all) => button.addEventListener("click", () => {
      all.forEach((other) => other.setAttribute("aria-pressed", String(other === button)));
      chart.view = at;
      draw(chart);
    }));
    figure.querySelectorAll(".tools button").forEach((button) => button.addEventListener("click", () => {
      if (button.dataset.save === "csv") save(`${figure.id}.csv`, new Blob([csv(figure.querySelector("table"))], { type: "text/csv" }));
      else picture(chart, button.dataset.save);
    }));
    return chart;
  }

  function drawShown() {
    for (const chart of charts.values()) if (chart.figure.offsetParent !== null) draw(chart);
  }

  const selector = document.getElementById("run");
  function showRun() {
    document.querySelectorAll(".of-run").forEach((part) => { part.hidden = part.dataset.run !== selector.value; });
    drawShown();
  }

  const toggle = document.getElementById("theme");
  const tell = () => toggle.setAttribute("aria-pressed", String(theme() === "dark"));
  toggle.addEventListener("click", () => {
    root.dataset.theme = theme() === "dark" ? "light" : "dark";
    tell();
    drawShown();
  });
  prefersDark.addEventListener("change", () => { tell(); drawShown(); });

  document.querySelectorAll("button[data-file]").forEach((button) => button.addEventListener("click", () => {
    const text = document.getElementById(button.getAttribute("aria-controls")).textContent;
    save(button.dataset.file, new Blob([text], { type: "application/toml" }));
  }));

  let width = innerWidth;
  let waiting = 0;
  addEventListener("resize", () => {
    if (innerWidth === width || printing) return;
    width = innerWidth;
    clearTimeout(waiting);
    waiting = setTimeout(drawShown, 150);
  });
  addEventListener("beforeprint", () => { printing = true; drawShown(); });
  addEventListener("afterprint", () => { printing = false; drawShown(); });

  tell();
  document.querySelectorAll("figure.chart").forEach(prepare);
  if (selector) {
    selector.addEventListener("change", showRun);
    showRun();
  } else {
    drawShown();
  }
  root.dataset.ready = "yes";
})();
