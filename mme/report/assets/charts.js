// Draws each chart of the page. Expressions are interpreted, not compiled, so that the page's policy needs no eval.
"use strict";
{ // a separate scope, because Vega's script declares short names at the top level
const font = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif";
const config = {
  background: null,
  font: font,
  view: { stroke: null },
  axis: {
    domainColor: "var(--grid)", gridColor: "var(--grid)", tickColor: "var(--grid)",
    labelColor: "var(--soft)", titleColor: "var(--soft)",
    labelFontSize: 11, titleFontSize: 12, titleFontWeight: "normal", labelLimit: 220,
  },
};
const options = {
  mode: "vega-lite", ast: true, renderer: "svg", actions: false, defaultStyle: false, config: config,
  tooltip: { disableDefaultStyle: true },
};
const charts = JSON.parse(document.getElementById("charts").textContent);
const drawing = charts.map((spec, index) => {
  const place = document.getElementById("chart-" + index);
  return vegaEmbed(place, spec, options).catch((error) => {
    place.textContent = "This chart could not be drawn: " + error.message;
    console.error(error);
  });
});
Promise.all(drawing).then(() => { document.body.dataset.charts = "drawn"; });
}
