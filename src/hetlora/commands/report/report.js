"use strict";
(() => {
  // Colours of text and grid come from the style sheet, so that they follow the theme of the page.
  const coarse = matchMedia("(pointer: coarse)").matches || innerWidth < 600;
  const draw = (figure) => {
    const plot = figure.querySelector(".plot");
    if (plot.data || figure.closest("details:not([open])")) return;
    const { data, layout } = JSON.parse(figure.querySelector("script").textContent);
    const picture = { format: "svg", filename: figure.id };
    const settings = { responsive: true, displaylogo: false, toImageButtonOptions: picture };
    Plotly.newPlot(plot, data, { ...layout, dragmode: coarse ? false : "zoom" }, { ...settings, displayModeBar: coarse ? false : "hover" });
  };
  const figures = [...document.querySelectorAll("figure")];
  const resize = (width) => {
    for (const figure of figures) {
      const plot = figure.querySelector(".plot");
      if (plot.data) Plotly.relayout(plot, { width, autosize: width === null });
    }
  };
  document.querySelectorAll("details").forEach((part) => part.addEventListener("toggle", () => figures.forEach(draw)));
  addEventListener("beforeprint", () => resize(660));
  addEventListener("afterprint", () => resize(null));
  figures.forEach(draw);
  document.documentElement.dataset.ready = "yes";
})();
