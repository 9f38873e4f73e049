// Keeps a page current: events say that something changed, then the marked regions and the pictures are fetched anew.

const root = document.querySelector("[data-events], [data-poll]");
const banner = document.getElementById("banner");
const RETRY_MS = 2000;
let pending = 0;
let lost = false;

function say(text) {
  banner.textContent = text;
  banner.hidden = !text;
}

async function refresh() {
  pending = 0;
  let answer;
  try {
    answer = await fetch(location.href, { headers: { Accept: "text/html" } });
  } catch {
    return mark(true);
  }
  if (answer.status === 401) return say("The session has ended · open the address with the token again");
  if (!answer.ok) return mark(true);
  const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
  // Parts that were not there before (the first result of a study, the end of a trial) need the whole page.
  if (fresh.querySelector("[data-shape]")?.dataset.shape !== root.dataset.shape) return location.reload();
  for (const region of document.querySelectorAll("[data-live]")) {
    const newer = fresh.getElementById(region.id);
    if (!newer || newer.innerHTML === region.innerHTML) continue;
    const focus = region.contains(document.activeElement) ? document.activeElement.getAttribute("href") : null;
    const open = [...region.querySelectorAll("details")].map((item) => item.open);
    newer.querySelectorAll("details").forEach((item, i) => { item.open = Boolean(open[i]); });
    region.replaceChildren(...newer.childNodes);
    if (focus) [...region.querySelectorAll("a")].find((link) => link.getAttribute("href") === focus)?.focus();
  }
  document.dispatchEvent(new Event("charts:refresh"));
  mark(false);
}

function later(ms) {
  if (!pending) pending = setTimeout(refresh, ms);
}

function mark(isLost) {
  if (isLost) say("Connection lost · trying again");
  else if (lost) say("");
  const healed = lost && !isLost;
  lost = isLost;
  return healed;
}

function listen() {
  const source = new EventSource(root.dataset.events);
  source.addEventListener("open", () => { if (mark(false)) later(0); });
  source.addEventListener("change", () => later(250));
  // The server ends long streams now and then; only a silence longer than a reconnection is a loss.
  source.addEventListener("error", () => {
    const closed = source.readyState === EventSource.CLOSED;
    setTimeout(() => {
      if (closed || source.readyState !== EventSource.OPEN) mark(true);
      if (closed) listen();
    }, RETRY_MS);
  });
}

if (root && root.dataset.events) listen();
if (root && root.dataset.poll) {
  setInterval(() => { if (!document.hidden) refresh(); }, 1000 * Number(root.dataset.poll));
}

// The choice of axes lives in the address, so that it can be sent.
const axes = document.getElementById("axes");
if (axes) {
  axes.addEventListener("change", (event) => {
    const [x, y] = [axes.elements.x, axes.elements.y];
    const other = event.target === x ? y : x;
    if (x.value === y.value) other.value = [...other.options].map((o) => o.value).find((v) => v !== event.target.value);
    const query = new URLSearchParams({ x: x.value, y: y.value });
    const address = new URL(location.href);
    for (const [name, value] of query) address.searchParams.set(name, value);
    history.replaceState(null, "", address);
    for (const box of document.querySelectorAll('[data-chart="front"]')) {
      box.dataset.source = `${box.dataset.source.split("?")[0]}?${query}`;
    }
    document.dispatchEvent(new Event("charts:refresh"));
  });
}
