// The crowd: layouts too many for a mark each, as dots on a canvas behind Plotly's picture. Plotly's own way for so many
// writes code as it runs, which the policy of the pages forbids; and this one needs no graphics processor.

const DOT_PX = 2;
const REACH_PX = 5;
const CLICK_MS = 280;
const QUARTERS = 4;

// How much of each pixel around a dot's middle the dot covers, in quarters.
function stencil(radius) {
  const reach = Math.ceil(radius);
  const found = [];
  for (let y = -reach; y <= reach; y += 1) {
    for (let x = -reach; x <= reach; x += 1) {
      let inside = 0;
      for (const a of [-0.25, 0.25]) for (const b of [-0.25, 0.25]) inside += Math.hypot(x + a, y + b) <= radius;
      if (inside) found.push([x, y, inside]);
    }
  }
  return found;
}

// A number of an axis in the words of its unit.
function worded(value, unit) {
  const digits = { maximumSignificantDigits: 3 };
  if (unit !== "B") return value.toLocaleString("en", digits) + (unit ? ` ${unit}` : "");
  const step = Math.max(0, Math.min(4, Math.floor(Math.log2(Math.max(value, 1)) / 10)));
  return `${(value / 1024 ** step).toLocaleString("en", digits)} ${["B", "KiB", "MiB", "GiB", "TiB"][step]}`;
}

const onScale = (axis, values) => (axis.type === "log" ? Float32Array.from(values, Math.log10) : values);

class Crowd {
  constructor(box) {
    this.box = box;
    this.canvas = Object.assign(document.createElement("canvas"), { className: "crowd" });
    this.tip = Object.assign(document.createElement("div"), { className: "tip", hidden: true });
    this.ring = Object.assign(document.createElement("div"), { className: "ring", hidden: true });
    for (const part of [this.canvas, this.tip, this.ring]) part.setAttribute("aria-hidden", "true");
    box.before(this.canvas);
    box.after(this.ring, this.tip);
    this.pointed = -1;
    this.marked = false;
    this.waiting = 0;
    box.addEventListener("pointermove", (event) => this.point(event));
    box.addEventListener("pointerleave", () => this.leave());
    box.addEventListener("pointerdown", (event) => this.press(event), true);
    document.addEventListener("pointerup", (event) => this.release(event), true);
  }

  // A trace of the figure, or nothing; drawn once Plotly has drawn its axes.
  show(trace, colour) {
    this.leave();
    this.trace = trace || null;
    this.colour = colour;
    this.sources = null;
    this.draw();
  }

  draw(ranges) {
    const axes = this.box._fullLayout;
    this.canvas.hidden = !this.trace || !axes || !axes.xaxis;
    if (this.canvas.hidden) return;
    const { xaxis, yaxis } = axes;
    const [xRange, yRange] = ranges || [xaxis.range, yaxis.range];
    const density = Math.min(window.devicePixelRatio || 1, 2);
    const [width, height] = [xaxis, yaxis].map((axis) => Math.max(1, Math.round(axis._length * density)));
    Object.assign(this.canvas, { width, height });
    Object.assign(this.canvas.style, { left: `${xaxis._offset}px`, top: `${yaxis._offset}px`, width: `${xaxis._length}px`, height: `${yaxis._length}px` });
    const kinds = `${xaxis.type} ${yaxis.type}`;
    if (!this.sources || this.kinds !== kinds) this.sources = [onScale(xaxis, this.trace.x), onScale(yaxis, this.trace.y)];
    this.kinds = kinds;
    const [xs, ys] = this.sources;
    const dots = stencil(DOT_PX * density);
    const weights = Uint8Array.from(dots, (dot) => dot[2]);
    const steps = Int32Array.from(dots, ([x, y]) => y * width + x);
    const reach = Math.ceil(DOT_PX * density);
    const within = new Uint8ClampedArray(width * height);
    const outside = new Uint8ClampedArray(width * height);
    const first = this.trace.meta.outside === undefined ? 0 : xs.length - this.trace.meta.caught;
    // Which layout stands at a pixel, counted from 1: how a pointer finds it again.
    this.owners = new Int32Array(width * height);
    this.size = [width, height, density];
    const across = (width - 1) / (xRange[1] - xRange[0]);
    const down = (height - 1) / (yRange[1] - yRange[0]);
    for (let i = 0; i < xs.length; i += 1) {
      const x = Math.round((xs[i] - xRange[0]) * across);
      const y = Math.round((yRange[1] - ys[i]) * down);
      if (!(x >= -reach && x < width + reach && y >= -reach && y < height + reach)) continue;
      const at = y * width + x;
      const covered = i < first ? outside : within;
      if (x >= reach && x < width - reach && y >= reach && y < height - reach) {
        for (let k = 0; k < steps.length; k += 1) covered[at + steps[k]] += weights[k];
      } else {
        for (const [dx, dy, weight] of dots) {
          if (x + dx >= 0 && x + dx < width && y + dy >= 0 && y + dy < height) covered[at + dy * width + dx] += weight;
        }
      }
      if (x >= 0 && x < width && y >= 0 && y < height) this.owners[at] = i + 1;
    }
    this.paint(within, outside, width, height);
  }

  paint(within, outside, width, height) {
    const context = this.canvas.getContext("2d");
    context.fillStyle = this.colour;
    const hex = Number.parseInt(context.fillStyle.slice(1), 16);
    const picture = context.createImageData(width, height);
    const pixels = picture.data;
    // What so many dots over one another let through.
    const through = (opacity) => Float32Array.from({ length: 256 }, (_, n) => (1 - opacity) ** (n / QUARTERS));
    const [shown, faint] = [through(this.trace.marker.opacity), through(this.trace.meta.outside ?? 0)];
    for (let i = 0; i < within.length; i += 1) {
      if (!within[i] && !outside[i]) continue;
      pixels[4 * i] = hex >> 16;
      pixels[4 * i + 1] = (hex >> 8) & 255;
      pixels[4 * i + 2] = hex & 255;
      pixels[4 * i + 3] = Math.round(255 * (1 - shown[Math.min(within[i], 255)] * faint[Math.min(outside[i], 255)]));
    }
    context.putImageData(picture, 0, 0);
  }

  // The layout nearest to a place of the canvas, or -1 where none is near.
  near(left, top) {
    if (this.canvas.hidden || !this.owners) return -1;
    const [width, height, density] = this.size;
    const reach = Math.ceil(REACH_PX * density);
    const [x, y] = [Math.round(left * density), Math.round(top * density)];
    let [best, found] = [reach * reach + 1, -1];
    for (let row = Math.max(0, y - reach); row <= Math.min(height - 1, y + reach); row += 1) {
      for (let column = Math.max(0, x - reach); column <= Math.min(width - 1, x + reach); column += 1) {
        const owner = this.owners[row * width + column];
        const far = (row - y) ** 2 + (column - x) ** 2;
        if (owner && far < best) [best, found] = [far, owner - 1];
      }
    }
    return found;
  }

  at(event) {
    const edge = this.canvas.getBoundingClientRect();
    const [left, top] = [event.clientX - edge.left, event.clientY - edge.top];
    return left < 0 || top < 0 || left > edge.width || top > edge.height ? -1 : this.near(left, top);
  }

  point(event) {
    // Nothing is pointed at while something is dragged.
    const place = this.marked || event.buttons ? -1 : this.at(event);
    if (place === this.pointed) return;
    this.leave();
    if (place < 0) return;
    this.pointed = place;
    this.mark(place);
    this.tell("crowd:enter", place);
  }

  leave() {
    if (this.pointed >= 0) this.tell("crowd:leave", this.pointed);
    this.pointed = -1;
    this.tip.hidden = this.ring.hidden = true;
  }

  // A mark of Plotly's own is pointed at, or no longer: it comes first.
  yield(marked) {
    this.marked = marked;
    if (marked) this.leave();
  }

  tell(name, place) {
    if (this.trace && place < this.trace.customdata.length) {
      this.box.dispatchEvent(new CustomEvent(name, { detail: this.trace.customdata[place] }));
    }
  }

  words(place) {
    const [x, y] = ["x", "y"].map((letter, i) => worded(this.trace[letter][place], this.trace.meta.units[i]));
    const values = { customdata: String(this.trace.customdata[place]), x, y };
    const plain = new DOMParser().parseFromString(this.trace.hovertemplate.replace("<extra></extra>", "").replaceAll("<br>", "\n"), "text/html").body.textContent;
    return plain.replace(/%\{(customdata|x|y)\}/g, (_, name) => values[name]);
  }

  // A ring around one layout, and words beside it.
  mark(place) {
    if (!this.sources || this.canvas.hidden) return;
    const { xaxis, yaxis } = this.box._fullLayout;
    const [x, y] = [this.sources[0][place], this.sources[1][place]];
    const left = xaxis._offset + (xaxis._length * (x - xaxis.range[0])) / (xaxis.range[1] - xaxis.range[0]);
    const top = yaxis._offset + (yaxis._length * (yaxis.range[1] - y)) / (yaxis.range[1] - yaxis.range[0]);
    if (!(left >= xaxis._offset && left <= xaxis._offset + xaxis._length && top >= yaxis._offset && top <= yaxis._offset + yaxis._length)) return;
    Object.assign(this.ring.style, { left: `${left}px`, top: `${top}px` });
    this.ring.hidden = false;
    this.tip.hidden = false;
    this.tip.textContent = this.words(place);
    const before = left > this.box.clientWidth / 2;
    Object.assign(this.tip.style, { left: before ? "auto" : `${left + 12}px`, right: before ? `${this.box.clientWidth - left + 12}px` : "auto", top: `${top}px` });
  }

  press(event) {
    this.pressed = event.button ? null : { x: event.clientX, y: event.clientY, place: this.marked ? -1 : this.at(event) };
  }

  release(event) {
    const pressed = this.pressed;
    this.pressed = null;
    if (!pressed || Math.hypot(event.clientX - pressed.x, event.clientY - pressed.y) > 3) return;
    clearTimeout(this.waiting);
    // The second click of two shows everything again, so that the first one waits for it.
    const again = performance.now() - (this.clicked || -1e9) < CLICK_MS;
    this.clicked = performance.now();
    if (!again && pressed.place >= 0) this.waiting = setTimeout(() => this.tell("crowd:click", pressed.place), CLICK_MS);
  }
}

globalThis.Crowd = Crowd;
