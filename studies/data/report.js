"use strict";
// On paper, figures get this width in pixels: that of a page without its margins.
const PAPER = 690;
const drawings = [...document.querySelectorAll(".drawing")];
for (const drawing of drawings) {
  const { data, layout } = JSON.parse(document.getElementById(drawing.dataset.figure).textContent);
  Plotly.newPlot(drawing, data, layout, { displayModeBar: false, responsive: true, scrollZoom: false });
}
addEventListener("beforeprint", () => {
  for (const drawing of drawings) Plotly.relayout(drawing, { width: PAPER });
});
addEventListener("afterprint", () => {
  for (const drawing of drawings) Plotly.relayout(drawing, { width: null, autosize: true });
});
