// Draws every [data-chart] from JSON in the page (data-inline) or behind an address (data-source), in the colours
// of the current scheme; ties its points to the rows of the same trial; saves it as a file.

const scheme = matchMedia("(prefers-color-scheme: dark)");
// Plotly would offer to upload a picture to its maker: nothing of a study leaves the page.
const settings = { displaylogo: false, showSendToCloud: false, plotlyServerURL: "", responsive: true, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d", "toImage"] };
// The data is asked for while Plotly is still being read: scripts that are deferred have run once this fires.
const ready = window.Plotly ? Promise.resolve() : new Promise((run) => document.addEventListener("DOMContentLoaded", run, { once: true }));
const CROWD = "beaten";
const NARROW_PX = 520;
const CARD_MS = 120;
const ARRAYS = { f4: Float32Array, i4: Int32Array };

function resolved(value, styles) {
  if (typeof value === "string") {
    return value.startsWith("var(") ? styles.getPropertyValue(value.slice(4, -1)).trim() : value;
  }
  if (ArrayBuffer.isView(value)) return value;
  if (Array.isArray(value)) return value.map((item) => resolved(item, styles));
  if (value && typeof value === "object") {
    return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, resolved(item, styles)]));
  }
  return value;
}

function bytesOf(text) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
  const letters = atob(text);
  const bytes = new Uint8Array(letters.length);
  for (let place = 0; place < letters.length; place += 1) bytes[place] = letters.charCodeAt(place);
  return bytes;
}

function unpacked(column) {
  if (!column || !column.bdata) return column;
  return new ARRAYS[column.dtype](bytesOf(column.bdata).buffer);
}

function unpackAll(figure) {
  for (const trace of figure.data) {
    for (const key of ["x", "y", "z", "customdata"]) if (trace[key]) trace[key] = unpacked(trace[key]);
  }
  return figure;
}

const isCrowd = (trace) => trace.name === CROWD && trace.type === "scattergl";
const crowdOf = (figure) => figure.data.find(isCrowd);

// The crowd grows by what changed: a trial that is known is moved, the others are added at the end.
function placesOf(trace) {
  if (!trace.places) {
    trace.places = new Map();
    trace.customdata.forEach((number, place) => trace.places.set(number, place));
  }
  return trace.places;
}

function joined(before, trace) {
  const places = placesOf(before);
  const added = [];
  trace.customdata.forEach((number, place) => {
    const known = places.get(number);
    if (known === undefined) added.push(place);
    else for (const key of ["x", "y"]) before[key][known] = trace[key][place];
  });
  const merged = { ...trace, places };
  for (const key of ["x", "y", "customdata"]) {
    const longer = new before[key].constructor(before[key].length + added.length);
    longer.set(before[key]);
    added.forEach((place, i) => { longer[before[key].length + i] = trace[key][place]; });
    merged[key] = longer;
  }
  added.forEach((place, i) => places.set(trace.customdata[place], before.customdata.length + i));
  return merged;
}

function narrowed(figure, box) {
  // A phone has no room for a scale at the side, nor for a legend of many names above.
  if (box.clientWidth >= NARROW_PX) return figure;
  const layout = { ...figure.layout, height: figure.layout.height || 400 };
  if (layout.coloraxis && layout.coloraxis.colorbar.orientation !== "h") {
    const bar = layout.coloraxis.colorbar;
    const below = { ...bar, orientation: "h", y: -0.3, yanchor: "top", len: 0.9, title: { ...bar.title, side: "top" } };
    layout.coloraxis = { ...layout.coloraxis, colorbar: below };
    layout.height += 70;
  }
  const named = figure.data.filter((trace) => trace.showlegend !== false && trace.name).length;
  if (named > 5 && !layout.coloraxis && !layout.scene) {
    layout.legend = { ...layout.legend, orientation: "v", x: 0, y: -64 / layout.height, yanchor: "top" };
    layout.height += 21 * named;
  }
  return { ...figure, layout };
}

async function figureOf(box) {
  if (box.dataset.inline) return unpackAll(JSON.parse(document.getElementById(box.dataset.inline).textContent));
  const address = new URL(box.dataset.source, location.href);
  if (box.clientWidth < NARROW_PX) address.searchParams.set("narrow", "1");
  const known = box.figure && box.drawnFrom === address.href ? box.figure : null;
  const asked = address.href;
  const crowd = known && crowdOf(known);
  // A lasso has parted the crowd: it comes whole.
  const parted = address.searchParams.has("area") || crowd?.meta.outside !== undefined;
  if (crowd && !parted) address.searchParams.set("since", known.version);
  const answer = await fetch(address, { headers: { Accept: "application/json" } });
  if (!answer.ok) throw new Error(`the picture's data answered ${answer.status}`);
  const figure = unpackAll(await answer.json());
  if (figure.increment && crowd) {
    figure.data = figure.data.map((trace) => (isCrowd(trace) ? joined(crowd, trace) : trace));
  }
  box.drawnFrom = asked;
  return figure;
}

function zoomed(layout, box) {
  // The zoom stands behind the # of the address, since it is the reader's own and asks nothing of the server.
  const held = new URLSearchParams(location.hash.slice(1)).get("zoom");
  if (box.dataset.chart !== "front" || !held || !layout.xaxis) return layout;
  const ends = held.split(",").map(Number);
  if (ends.length !== 4 || !ends.every(Number.isFinite)) return layout;
  return { ...layout, xaxis: { ...layout.xaxis, range: ends.slice(0, 2) }, yaxis: { ...layout.yaxis, range: ends.slice(2) } };
}

// Plotly goes back to the axes it was first given, which may be those of a zoom that somebody sent, or of other objectives.
function showWhole(box) {
  const { xaxis, yaxis } = box.figure.layout;
  history.replaceState(null, "", location.pathname + location.search);
  Plotly.relayout(box, { "xaxis.range": [...xaxis.range], "yaxis.range": [...yaxis.range] });
}

function settingsOf(box, flat) {
  if (box.dataset.chart !== "front" || !flat) return settings;
  const button = { name: "whole", title: "Show everything", icon: Plotly.Icons.home, click: showWhole };
  const removed = [...settings.modeBarButtonsToRemove, "resetScale2d"];
  return { ...settings, doubleClick: false, modeBarButtonsToRemove: removed, modeBarButtonsToAdd: [button] };
}

async function draw(box) {
  const turn = box.turn = (box.turn || 0) + 1;
  try {
    const figure = await figureOf(box);
    await ready;
    if (turn !== box.turn) return;
    const styles = getComputedStyle(document.documentElement);
    const flat = !figure.layout.scene;
    // Two dimensions and three share nothing that could be carried over.
    if (box.figure && Boolean(box.figure.layout.scene) === flat) Plotly.purge(box), (box.tied = false);
    box.figure = figure;
    const fitted = narrowed(figure, box);
    const own = fitted.data.filter((trace) => trace !== crowdOf(figure));
    const { data, layout } = resolved({ data: own, layout: zoomed(fitted.layout, box) }, styles);
    if (flat && box.lasso) layout.dragmode = "lasso";
    await Plotly.react(box, data, layout, settingsOf(box, flat));
    if (box.querySelector(".no-webgl")) throw new Error("three dimensions need WebGL, which this browser does not offer");
    const crowd = crowdOf(figure);
    if (crowd && !box.crowd) tieCrowd(box);
    if (!box.tied) tie(box);
    box.crowd?.show(crowd, crowd && resolved(crowd.marker.color, styles));
    box.dataset.state = "drawn";
    // Made ready while nobody waits, so that the first new trials are not the ones that pay for it.
    if (crowd && window.requestIdleCallback) requestIdleCallback(() => placesOf(crowd));
  } catch (error) {
    box.dataset.state = "failed";
    const flat = box.querySelector(".no-webgl");
    if (flat) Plotly.purge(box);
    if (flat || !box.figure) box.textContent = `${flat ? "Three dimensions need WebGL, which this browser does not offer; choose 2-D." : "This picture could not be drawn."} The table below holds the same numbers.`;
    console.warn(error);
  }
}

const rowsOf = (trial) => document.querySelectorAll(`[data-trial="${Number(trial)}"]`);

function light(trial, on) {
  for (const row of rowsOf(trial)) row.classList.toggle("lit", on);
  if (!on) return;
  const row = [...rowsOf(trial)].find((one) => one.closest("#beside"));
  const scroll = row && row.closest(".scroll");
  if (scroll && scroll.scrollHeight > scroll.clientHeight) {
    scroll.scrollTop = Math.max(0, row.offsetTop - scroll.clientHeight / 2);
  }
}

let asking = 0;
function showCard(box, trial) {
  const place = document.getElementById("pointed");
  if (!place || !box.dataset.trials) return;
  clearTimeout(asking);
  asking = setTimeout(async () => {
    const answer = await fetch(`${box.dataset.trials}/${Number(trial)}/card`).catch(() => null);
    if (!answer || !answer.ok) return;
    const card = new DOMParser().parseFromString(await answer.text(), "text/html");
    place.replaceChildren(...card.body.childNodes);
  }, CARD_MS);
}

const enter = (box, trial) => (light(trial, true), showCard(box, trial));
const open = (box, trial) => box.dataset.trials && location.assign(`${box.dataset.trials}/${Number(trial)}`);

function tieCrowd(box) {
  box.crowd = new Crowd(box);
  box.addEventListener("crowd:enter", (event) => enter(box, event.detail));
  box.addEventListener("crowd:leave", (event) => light(event.detail, false));
  box.addEventListener("crowd:click", (event) => open(box, event.detail));
}

function tie(box) {
  box.tied = true;
  const trialOf = (event) => event.points && event.points[0] && event.points[0].customdata;
  box.on("plotly_hover", (event) => {
    box.crowd?.yield(true);
    if (trialOf(event) !== undefined) enter(box, trialOf(event));
  });
  box.on("plotly_unhover", (event) => {
    box.crowd?.yield(false);
    if (trialOf(event) !== undefined) light(trialOf(event), false);
  });
  if (box.dataset.chart === "front" && !box.figure.layout.scene) box.on("plotly_doubleclick", () => showWhole(box));
  box.on("plotly_afterplot", () => box.crowd?.draw());
  box.on("plotly_relayouting", (change) => {
    const [x, y] = ["x", "y"].map((letter) => [0, 1].map((end) => change[`${letter}axis.range[${end}]`] ?? box._fullLayout[`${letter}axis`].range[end]));
    if (box._fullLayout.dragmode === "pan") box.crowd?.draw([x, y]);
  });
  box.on("plotly_click", (event) => {
    if (trialOf(event) !== undefined) open(box, trialOf(event));
  });
  box.on("plotly_selected", (event) => {
    const lasso = event && event.lassoPoints;
    if (lasso && lasso.x && lasso.x.length > 2) {
      document.dispatchEvent(new CustomEvent("charts:lasso", { detail: { x: lasso.x, y: lasso.y } }));
    }
  });
  box.on("plotly_relayout", (change) => {
    if (box.dataset.chart !== "front" || !box.layout.xaxis) return;
    const whole = change["xaxis.autorange"] || change["xaxis.range[0]"] === undefined;
    if (whole && !change["xaxis.autorange"]) return;
    const ends = [...box.layout.xaxis.range, ...box.layout.yaxis.range].map((end) => Number(end.toPrecision(6)));
    history.replaceState(null, "", whole ? location.pathname + location.search : `#zoom=${ends.join(",")}`);
  });
}

function pointAt(row, shown) {
  const box = document.querySelector('[data-chart="front"]');
  if (!box || !box.data || !box.layout || box.layout.scene) return;
  const number = Number(row.dataset.trial);
  row.classList.toggle("lit", shown);
  box.crowd?.leave();
  if (!shown) return Plotly.Fx.unhover(box);
  const place = box.crowd?.trace && placesOf(box.crowd.trace).get(number);
  if (place !== undefined && place !== null) return box.crowd.mark(place);
  box.data.forEach((trace, curveNumber) => {
    const pointNumber = (trace.customdata || []).indexOf(number);
    if (pointNumber >= 0) Plotly.Fx.hover(box, [{ curveNumber, pointNumber }]);
  });
}

// A picture with its crowd, which Plotly knows nothing of, as an image behind the marks.
function whole(box) {
  if (!box.crowd?.trace) return box;
  const place = { xref: "x domain", yref: "y domain", x: 0, y: 1, sizex: 1, sizey: 1, sizing: "stretch", layer: "below" };
  return { data: box.data, layout: { ...box.layout, images: [{ ...place, source: box.crowd.canvas.toDataURL() }] } };
}

const all = () => [...document.querySelectorAll("[data-chart]")];
const drawAll = () => Promise.all(all().map(draw));

document.addEventListener("click", (event) => {
  const save = event.target.closest("[data-save]");
  const box = event.target.closest("figure.chart")?.querySelector("[data-chart]");
  if (save && box && box.figure) {
    const title = document.title.replace(/[^\p{L}\p{N}]+/gu, "-");
    Plotly.downloadImage(whole(box), { format: save.dataset.save, filename: `${title}-${box.dataset.chart}`, width: box.clientWidth, height: box.clientHeight, scale: 2 });
  }
  const lasso = event.target.closest("[data-lasso]");
  if (lasso && box && box.figure) {
    box.lasso = lasso.getAttribute("aria-pressed") !== "true";
    lasso.setAttribute("aria-pressed", String(box.lasso));
    Plotly.relayout(box, { dragmode: box.lasso ? "lasso" : "zoom" });
  }
});
scheme.addEventListener("change", drawAll);
document.addEventListener("charts:refresh", () => all().forEach((box) => box.dataset.source && draw(box)));
for (const [name, shown] of [["mouseover", true], ["mouseout", false], ["focusin", true], ["focusout", false]]) {
  document.addEventListener(name, (event) => {
    const row = event.target.closest && event.target.closest("[data-tied] [data-trial]");
    if (row && !row.contains(event.relatedTarget)) pointAt(row, shown);
  });
}
drawAll();
