// Draws every [data-chart] from JSON in the page (data-inline) or behind an address (data-source), in the colours
// of the current scheme, and ties its points to the rows of the same trial.

const scheme = matchMedia("(prefers-color-scheme: dark)");
const still = { displaylogo: false, responsive: true, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };

function resolved(value, styles) {
  if (typeof value === "string" && value.startsWith("var(")) {
    return styles.getPropertyValue(value.slice(4, -1)).trim();
  }
  if (Array.isArray(value)) return value.map((item) => resolved(item, styles));
  if (value && typeof value === "object") {
    return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, resolved(item, styles)]));
  }
  return value;
}

async function figureOf(box) {
  if (box.dataset.inline) return JSON.parse(document.getElementById(box.dataset.inline).textContent);
  const answer = await fetch(box.dataset.source, { headers: { Accept: "application/json" } });
  if (!answer.ok) throw new Error(`the picture's data answered ${answer.status}`);
  return answer.json();
}

function narrowed(figure, box) {
  // A phone has no room for a scale at the side, nor for long names beside the points.
  if (box.clientWidth >= 520) return figure;
  const layout = { ...figure.layout };
  if (layout.coloraxis) {
    const bar = { ...layout.coloraxis.colorbar, orientation: "h", y: -0.3, yanchor: "top", len: 0.9, title: { ...layout.coloraxis.colorbar.title, side: "top" } };
    layout.coloraxis = { ...layout.coloraxis, colorbar: bar };
    layout.height = (layout.height || 400) + 70;
  }
  return { ...figure, layout };
}

async function draw(box) {
  try {
    const figure = box.figure = await figureOf(box);
    const styles = getComputedStyle(document.documentElement);
    const { data, layout } = resolved(narrowed(figure, box), styles);
    await Plotly.react(box, data, layout, still);
    box.dataset.state = "drawn";
    if (!box.tied) tie(box);
  } catch (error) {
    box.dataset.state = "failed";
    if (!box.figure) box.textContent = "This picture could not be drawn; the table below holds the same numbers.";
    console.warn(error);
  }
}

function light(trial, on) {
  for (const row of document.querySelectorAll(`[data-trial="${Number(trial)}"]`)) row.classList.toggle("lit", on);
}

function tie(box) {
  box.tied = true;
  const trial = (event) => event.points[0] && event.points[0].customdata;
  box.on("plotly_hover", (event) => trial(event) !== undefined && light(trial(event), true));
  box.on("plotly_unhover", (event) => trial(event) !== undefined && light(trial(event), false));
  box.on("plotly_click", (event) => {
    if (box.dataset.trials && trial(event) !== undefined) location.assign(`${box.dataset.trials}/${trial(event)}`);
  });
}

function pointAt(row, shown) {
  const box = document.querySelector('[data-chart="front"]');
  if (!box || !box.data) return;
  const number = Number(row.dataset.trial);
  if (!shown) return Plotly.Fx.unhover(box);
  box.data.forEach((trace, curveNumber) => {
    const pointNumber = (trace.customdata || []).indexOf(number);
    if (pointNumber >= 0) Plotly.Fx.hover(box, [{ curveNumber, pointNumber }]);
  });
}

const all = () => document.querySelectorAll("[data-chart]");
const drawAll = () => Promise.all([...all()].map(draw));

scheme.addEventListener("change", drawAll);
document.addEventListener("charts:refresh", () => all().forEach((box) => box.dataset.source && draw(box)));
for (const [name, shown] of [["mouseover", true], ["mouseout", false]]) {
  document.addEventListener(name, (event) => {
    const row = event.target.closest && event.target.closest("[data-tied] [data-trial]");
    if (row && !row.contains(event.relatedTarget)) pointAt(row, shown);
  });
}
drawAll();
