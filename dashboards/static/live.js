// Keeps a page current: an event says that something changed, and the view is brought in step with it. The browser
// resumes the stream after the last event that it has seen.

const root = document.querySelector("[data-events], [data-poll]");
const RETRY_MS = 2000;
const SETTLE_MS = 250;
const LONGEST_MS = 1000;
let pending = 0;
let first = 0;
let lost = false;

function refresh() {
  pending = first = 0;
  document.dispatchEvent(new Event("view:refresh"));
}

// Many events in a row are one refresh, and none waits for longer than a second.
function later(ms) {
  const now = performance.now();
  first ||= now;
  clearTimeout(pending);
  pending = setTimeout(refresh, Math.max(0, Math.min(ms, first + LONGEST_MS - now)));
}

function mark(isLost) {
  if (lost !== isLost) document.dispatchEvent(new CustomEvent("view:lost", { detail: isLost }));
  lost = isLost;
}

function concerns(event) {
  // The page of one layout follows that layout alone.
  const own = root.dataset.trialOfPage;
  if (own === undefined) return true;
  try {
    // What tells of no trial, such as a latency that was measured, may concern any of them.
    const { trial } = JSON.parse(event.data).payload;
    return trial === undefined || trial === Number(own);
  } catch {
    return true;
  }
}

function listen() {
  const source = new EventSource(root.dataset.events);
  source.addEventListener("open", () => { if (lost) later(0); mark(false); });
  source.addEventListener("change", (event) => concerns(event) && later(root.dataset.calm ? 5000 : SETTLE_MS));
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
// A large study is read beside the first view; what is there grows until all of it is.
setInterval(() => { if (document.querySelector("[data-unread]") && !document.hidden) refresh(); }, 1500);
