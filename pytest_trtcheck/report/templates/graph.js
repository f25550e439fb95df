"use strict";
// Draws the models of opened checks. dagre places the nodes, panzoom moves the picture; what each node says and which
// color it has is in the data, made where the report was made.
(() => {
const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 176, HEIGHT = 50, LONGEST = 25;  // of a box, and the columns of a name in it
const READABLE = 0.08;  // below it a whole model is a line
const FIRST = 30, GROWTH = 4;  // operators drawn at first, and how many times as many "Show more" draws
const structures = [...document.querySelectorAll(".graph-structure")].map((each) => JSON.parse(each.textContent));

function made(name, attributes = {}, text = "") {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text) element.textContent = text;
  return element;
}

/** A name as a box has room for it: its end tells nodes apart. */
function tail(name) {
  const columns = (text) => [...text].reduce((sum, each) => sum + (each > "\u2e7f" ? 2 : 1), 0);
  if (columns(name) <= LONGEST) return name;
  let end = name.slice(-LONGEST);
  while (columns(end) >= LONGEST) end = [...end].slice(1).join("");
  return `…${end}`;
}

class Model {
  constructor(section) {
    this.section = section;
    const data = section.querySelector(".graph-data");
    Object.assign(this, structures[data.dataset.structure], JSON.parse(data.textContent));
    this.writer = new Map();
    this.writes.forEach((tensors, node) => tensors.forEach((tensor) => this.writer.set(tensor, node)));
    // By node, who writes what it reads, and who reads what it writes.
    this.above = this.reads.map((tensors) => [...new Set(tensors.map((each) => this.writer.get(each)))].filter((each) => each !== undefined));
    this.below = this.names.map(() => []);
    this.above.forEach((nodes, node) => nodes.forEach((each) => this.below[each].push(node)));
    this.view = section.querySelector(".graph-view");
    this.info = section.querySelector(".graph-info");
    this.size = FIRST;
    this.center = this.chosen = this.focus;
    this.find(".graph-tools").hidden = this.view.hidden = false;
    this.find(".graph-still").classList.add("for-print");
    this.listen();
    this.draw();
    this.choose(this.focus);
  }

  find(selector) { return this.section.querySelector(selector); }

  /** The nodes nearest to the center, along the edges in either direction. */
  near() {
    if (this.size >= this.names.length) return new Set(this.names.keys());
    const found = new Set([this.center]);
    for (const node of found) {
      for (const each of [...this.above[node], ...this.below[node]]) {
        if (found.size >= this.size) return found;
        found.add(each);
      }
    }
    return found;
  }

  draw() {
    const shown = this.near();
    const graph = new dagre.Graph();
    graph.setGraph({ nodesep: 18, ranksep: 34, marginx: 24, marginy: 24 });
    graph.setDefaultEdgeLabel(() => ({}));
    for (const node of shown) graph.setNode(`n${node}`, { width: WIDTH, height: HEIGHT });
    const ends = [];  // inputs and outputs of the model: [id, word, tensor]
    const link = (from, to) => { if (from !== to) graph.setEdge(from, to); };
    for (const node of shown) {
      for (const each of this.above[node]) if (shown.has(each)) link(`n${each}`, `n${node}`);
    }
    this.inputs.forEach((tensor) => {
      const readers = [...shown].filter((node) => this.reads[node].includes(tensor));
      if (readers.length) ends.push([`i${tensor}`, "input", tensor, readers]);
    });
    this.outputs.forEach((tensor) => {
      if (shown.has(this.writer.get(tensor))) ends.push([`o${tensor}`, "output", tensor, [this.writer.get(tensor)]]);
    });
    for (const [id, word, , nodes] of ends) {
      graph.setNode(id, { width: WIDTH, height: 36 });
      nodes.forEach((node) => (word === "input" ? link(id, `n${node}`) : link(`n${node}`, id)));
    }
    dagre.layout(graph);
    this.shown = shown;
    this.layout = graph;
    this.show(graph, ends);
    const left = this.names.length - shown.size;
    this.find("[data-do=wider]").disabled = this.find("[data-do=all]").disabled = !left;
    this.find("[data-do=all]").textContent = left ? `Show all ${this.names.length}` : "All shown";
  }

  show(graph, ends) {
    this.panzoom?.destroy();
    const svg = made("svg", { tabindex: 0, role: "application", "aria-label": "The model as a graph: arrow keys go along the edges, plus and minus zoom, Home goes back, Escape fits the picture" });
    const stage = made("g");
    const edges = graph.edges().map((edge) => {
      const points = graph.edge(edge).points;
      const [start, ...rest] = points;
      let path = `M${start.x.toFixed(1)} ${start.y.toFixed(1)}`;
      // Through the middles between bends: a curve that turns no corner.
      rest.forEach((point, index) => {
        const last = index === rest.length - 1;
        const to = last ? point : { x: (point.x + rest[index + 1].x) / 2, y: (point.y + rest[index + 1].y) / 2 };
        path += `Q${point.x.toFixed(1)} ${point.y.toFixed(1)} ${to.x.toFixed(1)} ${to.y.toFixed(1)}`;
      });
      return path;
    });
    stage.append(made("path", { class: "edge", d: edges.join("") }));
    const stubs = [];
    this.boxes = new Map();
    for (const node of this.shown) {
      const { x, y } = graph.node(`n${node}`);
      if (this.above[node].some((each) => !this.shown.has(each))) stubs.push(`M${x} ${y - HEIGHT / 2}v-14`);
      if (this.below[node].some((each) => !this.shown.has(each))) stubs.push(`M${x} ${y + HEIGHT / 2}v14`);
      stage.append(this.box(node, x - WIDTH / 2, y - HEIGHT / 2));
    }
    for (const [id, word, tensor] of ends) {
      const { x, y } = graph.node(id);
      const group = made("g", { class: "end" });
      group.append(
        made("rect", { x: x - WIDTH / 2, y: y - 18, width: WIDTH, height: 36, rx: 18 }),
        made("text", { x, y: y - 3, "text-anchor": "middle", class: "op" }, word),
        made("text", { x, y: y + 11, "text-anchor": "middle" }, tail(this.tensors[tensor])),
      );
      group.append(made("title", {}, `${this.tensors[tensor]} ${this.types[tensor]}`));
      stage.append(group);
    }
    stage.append(made("path", { class: "edge stub", d: stubs.join("") }));
    svg.append(stage);
    this.svg = svg;
    this.view.replaceChildren(svg);
    this.color();
    this.panzoom = Panzoom(stage, { canvas: true, minScale: 0.02, maxScale: 4, step: 0.35, origin: "0 0", cursor: "grab", animate: false });
    stage.addEventListener("panzoomzoom", ({ detail }) => stage.style.setProperty("--line", Math.min(8, Math.max(1.2, 0.5 / detail.scale))));
    this.start = null;
    setTimeout(() => this.start && this.move(...this.start));
    svg.addEventListener("wheel", (event) => {
      // The page scrolls over a picture that nobody has chosen yet.
      if (event.ctrlKey || event.metaKey || document.activeElement === svg) this.panzoom.zoomWithWheel(event);
    }, { passive: false });
    svg.addEventListener("keydown", (event) => this.key(event));
  }

  box(node, x, y) {
    const group = made("g", { id: null });
    group.removeAttribute("id");
    group.dataset.node = node;
    const figure = made("text", { x: x + 8, y: y + 43, class: "figure" });
    group.append(
      made("rect", { x, y, width: WIDTH, height: HEIGHT, rx: 6 }),
      made("text", { x: x + 8, y: y + 15, class: "op" }, this.ops[node]),
      made("text", { x: x + 8, y: y + 29 }, tail(this.names[node])),
      figure,
      made("title", {}, `${this.ops[node]} ${this.names[node]}`),
    );
    if (node === this.culprit) group.append(made("text", { x: x + WIDTH / 2, y: y - 5, "text-anchor": "middle", class: "flag" }, "the culprit"));
    this.boxes.set(node, { group, figure });
    return group;
  }

  color() {
    for (const [node, { group, figure }] of this.boxes) {
      const marks = [node === this.culprit && "marked", this.others.includes(node) && "alike", node === this.chosen && "chosen"];
      group.setAttribute("class", ["node", `${this.mode}-${this.colours[this.mode][node]}`, ...marks.filter(Boolean)].join(" "));
      figure.textContent = this.texts[this.mode][node] || this.unknown[this.mode].split(":")[0];
    }
    for (const legend of this.section.querySelectorAll(".graph-legend")) legend.hidden = legend.dataset.mode !== this.mode;
  }

  /** Mark a node, say what is known of it, and bring it into sight; where it is not drawn, draw what is around it. */
  choose(node, center = true) {
    this.chosen = node;
    if (!this.shown.has(node)) { this.center = node; this.draw(); }
    this.color();
    this.tell(node);
    if (center) this.look(node);
  }

  look(node, scale) {
    const { x, y } = this.layout.node(`n${node}`);
    const { width, height } = this.svg.getBoundingClientRect();
    const zoom = scale ?? Math.max(this.panzoom.getScale(), width < 500 ? 0.8 : 1);
    this.move(zoom, width / 2 / zoom - x, height / 2 / zoom - y);
  }

  /** Panzoom moves before it scales, and goes to its own start a moment after it was made. */
  move(zoom, x, y) {
    this.start = [zoom, x, y];
    this.panzoom.zoom(zoom);
    this.panzoom.pan(x, y);
  }

  /** Around the middle of what is seen. */
  zoom(factor) {
    const { width, height } = this.svg.getBoundingClientRect();
    const before = this.panzoom.getScale(), { x, y } = this.panzoom.getPan();
    const now = Math.min(4, Math.max(0.02, before * factor));
    this.move(now, x + width / 2 * (1 / now - 1 / before), y + height / 2 * (1 / now - 1 / before));
  }

  fit() {
    const { width, height } = this.svg.getBoundingClientRect();
    const whole = this.layout.graph();
    const zoom = Math.min(width / whole.width, height / whole.height, 1);
    this.move(zoom, (width / zoom - whole.width) / 2, (height / zoom - whole.height) / 2);
  }

  tell(node) {
    const facts = [["Operator", `${this.ops[node]} ${this.names[node]}`]];
    if (node === this.culprit && this.why) facts.push(["Why", this.why]);
    const tensor = (each) => [this.tensors[each], this.types[each], this.errors[each] ? `error ${this.errors[each]}` : "error not measured"].filter(Boolean).join(" · ");
    this.reads[node].forEach((each) => facts.push(["Reads", tensor(each)]));
    this.writes[node].forEach((each) => facts.push(["Gives", tensor(each)]));
    facts.push(["Loses by itself", this.texts.own[node] || this.unknown.own]);
    facts.push(["Computes in", this.texts.precision[node] || this.unknown.precision]);
    facts.push(["Time", this.texts.time[node] || this.unknown.time]);
    this.layersOf[node].forEach((each) => facts.push(["Layer", this.layers[each]]));
    const list = document.createElement("dl");
    for (const [name, value] of facts) {
      const row = document.createElement("div");
      row.append(Object.assign(document.createElement("dt"), { textContent: name }), Object.assign(document.createElement("dd"), { textContent: value }));
      list.append(row);
    }
    const title = document.createElement("p");
    title.className = "graph-chosen";
    title.textContent = node === this.culprit ? "The culprit" : this.others.includes(node) ? this.alike[0].toUpperCase() + this.alike.slice(1) : "Chosen";
    const around = Object.assign(document.createElement("button"), { type: "button", textContent: "Draw what is around it" });
    around.addEventListener("click", () => { this.center = node; this.draw(); this.choose(node); });
    title.append(" ", around);
    this.info.replaceChildren(title, list);
  }

  search(text) {
    const terms = text.toLowerCase().split(/\s+/).filter(Boolean);
    this.hits = !terms.length ? [] : [...this.names.keys()].filter((node) => {
      const said = [this.ops[node], this.names[node], ...this.writes[node].map((each) => this.tensors[each])].join(" ").toLowerCase();
      return terms.every((term) => said.includes(term));
    });
    this.hit = 0;
    const exact = this.hits.findIndex((node) => [this.names[node], ...this.writes[node].map((each) => this.tensors[each])].includes(text.trim()));
    if (exact > 0) this.hit = exact;
    this.found();
  }

  found() {
    const output = this.find(".graph-found");
    output.textContent = this.hits.length ? `${this.hit + 1} of ${this.hits.length}` : this.find(".graph-search input").value.trim() ? "nothing" : "";
    if (this.hits.length) this.choose(this.hits[this.hit]);
  }

  /** Arrow keys: up to what it reads, down to what reads it, sideways along the row. */
  key(event) {
    const step = { "+": () => this.zoom(1.4), "=": () => this.zoom(1.4), "-": () => this.zoom(1 / 1.4), Escape: () => this.fit(), Home: () => this.choose(this.focus) }[event.key];
    if (step) { step(); event.preventDefault(); return; }
    if (!event.key.startsWith("Arrow") || event.ctrlKey || event.altKey || event.metaKey) return;
    const here = this.layout.node(`n${this.chosen}`);
    const at = (node) => this.layout.node(`n${node}`);
    let next = { ArrowUp: this.above, ArrowDown: this.below }[event.key]?.[this.chosen];
    if (next) next = [...next].sort((a, b) => this.shown.has(b) - this.shown.has(a));
    else {
      const sign = event.key === "ArrowLeft" ? -1 : 1;
      next = [...this.shown].filter((node) => Math.abs(at(node).y - here.y) < 1 && sign * (at(node).x - here.x) > 0)
        .sort((a, b) => sign * (at(a).x - at(b).x));
    }
    if (next.length) this.choose(next[0]);
    event.preventDefault();
  }

  listen() {
    this.find(".graph-modes").addEventListener("change", (event) => { this.mode = event.target.value; this.color(); });
    const field = this.find(".graph-search input");
    field.addEventListener("focus", () => {
      if (!field.list.options.length && this.names.length <= 2000) {
        field.list.append(...this.names.map((value) => Object.assign(document.createElement("option"), { value })));
      }
    }, { once: true });
    field.addEventListener("input", () => this.search(field.value));
    field.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || !this.hits?.length) return;
      event.preventDefault();
      this.hit = (this.hit + (event.shiftKey ? this.hits.length - 1 : 1)) % this.hits.length;
      this.found();
    });
    const wider = (size) => {
      this.find(".graph-found").textContent = `placing ${Math.min(size, this.names.length)} operators …`;
      // Once that was painted: a thousand take a few seconds.
      requestAnimationFrame(() => setTimeout(() => {
        this.size = size;
        this.draw();
        this.find(".graph-found").textContent = "";
        this.fit();
        if (this.panzoom.getScale() < READABLE) this.look(this.chosen, READABLE);
      }));
    };
    const deeds = {
      in: () => this.zoom(1.4), out: () => this.zoom(1 / 1.4), fit: () => this.fit(),
      focus: () => { this.center = this.focus; this.choose(this.focus); this.look(this.focus, 1); },
      wider: () => wider(this.shown.size * GROWTH), all: () => wider(this.names.length),
    };
    this.find(".graph-buttons").addEventListener("click", (event) => deeds[event.target.dataset.do]?.());
    let pressed = null;
    this.view.addEventListener("pointerdown", (event) => { pressed = [event.clientX, event.clientY]; }, true);
    this.view.addEventListener("click", (event) => {
      this.svg.focus({ preventScroll: true });
      const box = event.target.closest("[data-node]");
      // The end of a drag is no click.
      if (box && pressed && Math.hypot(event.clientX - pressed[0], event.clientY - pressed[1]) < 6) this.choose(Number(box.dataset.node), false);
    });
    new ResizeObserver(() => { if (this.layout && this.view.clientWidth !== this.wide) { this.wide = this.view.clientWidth; this.look(this.chosen); } }).observe(this.view);
  }
}

// A model is laid out when it is first seen: a page may hold many.
const observer = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (!isIntersecting) continue;
    observer.unobserve(target);
    new Model(target);
  }
}, { rootMargin: "200px" });
for (const section of document.querySelectorAll(".graph")) observer.observe(section);
})();
