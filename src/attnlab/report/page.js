"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const data = JSON.parse($("data").textContent);
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const narrow = matchMedia("(max-width: 760px)");
  const touch = matchMedia("(pointer: coarse)");
  const SVG = "http://www.w3.org/2000/svg";
  let printing = false;

  const make = (name, properties = {}, ...children) => {
    const node = Object.assign(document.createElement(name), properties);
    node.append(...children);
    return node;
  };
  const draw_path = (attributes) => {
    const node = document.createElementNS(SVG, "path");
    for (const [name, value] of Object.entries(attributes)) if (value) node.setAttribute(name, value);
    return node;
  };
  const plain = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const visible = (token) => (token === " " ? "␣" : token.replace(/\n/g, "↵"));

  // Theme: the system's, until the reader chooses.
  const is_dark = () => !printing && (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const painted = (x) => {
    if (!is_dark()) return x;
    if (typeof x === "string") return data.dark[x] ?? x;
    if (Array.isArray(x)) return typeof x[0] === "number" ? x : x.map(painted);
    if (x && typeof x === "object") return Object.fromEntries(Object.entries(x).map(([k, v]) => [k, painted(v)]));
    return x;
  };
  const name_theme = () => {
    const next = is_dark() ? "light" : "dark";
    $("theme").textContent = next === "dark" ? "Dark" : "Light";
    $("theme").setAttribute("aria-label", `Switch to the ${next} theme`);
    return next;
  };
  $("theme").hidden = false;
  $("theme").addEventListener("click", () => {
    root.dataset.theme = is_dark() ? "light" : "dark";
    try { localStorage.setItem("attnlab-theme", root.dataset.theme); } catch { /* not allowed here: the choice lasts as long as the page */ }
    draw_all();
  });
  system.addEventListener("change", () => draw_all());
  narrow.addEventListener("change", () => draw_all());
  touch.addEventListener("change", () => draw_all());

  const config = (name) => ({
    displaylogo: false, responsive: true, modeBarButtons: [["toImage"]], displayModeBar: touch.matches ? false : "hover",
    doubleClick: touch.matches ? false : "reset+autosize", // a tap would count as two clicks
    toImageButtonOptions: { filename: `attnlab-${name}`, scale: 2 },
  });

  // Figures: one place, several views, a legend of buttons.
  const state = Object.fromEntries(Object.keys(data.figures).map((name) => [name, { view: 0, hidden: new Set() }]));

  const draw = (name) => {
    const node = $(`plot-${name}`), own = state[name], view = data.figures[name][own.view];
    const traces = painted(view.figure.data).map((t) => ({ ...t, visible: !own.hidden.has(t.legendgroup) }));
    const layout = { ...painted(view.figure.layout), dragmode: touch.matches ? false : "zoom" };
    if (narrow.matches) {
      if (layout.hovermode === "x unified") layout.hovermode = "closest";
      layout.margin = { ...layout.margin, l: 44, r: 8 };
      for (const axis of ["xaxis", "yaxis"]) layout[axis] = { ...layout[axis], nticks: 5 };
    }
    if (layout.hovermode === "closest") for (const t of traces) if (t.hovertemplate && !t.hovertemplate.includes("<extra>")) {
      t.hovertemplate = `<b>${t.name}</b> at step %{x:,d}<br>${t.hovertemplate}<extra></extra>`;
    }
    const figure = node.closest("figure");
    figure.querySelector("figcaption").textContent = view.caption;
    legend(name, figure.querySelector(".legend"), traces);
    return Plotly.react(node, traces, layout, config(name));
  };

  const legend = (name, box, traces) => {
    const named = traces.filter((t) => t.name && t.legendgroup);
    const focus = [...box.children].indexOf(document.activeElement);
    box.replaceChildren(...named.map((t) => {
      const color = t.line?.color ?? t.marker.color;
      const open = String(t.marker.symbol).endsWith("-open");
      const svg = document.createElementNS(SVG, "svg");
      svg.setAttribute("viewBox", "0 0 26 14");
      svg.setAttribute("class", "swatch");
      svg.setAttribute("aria-hidden", "true");
      if (t.line) svg.append(draw_path({ d: "M1 7H25", stroke: color, "stroke-width": "2", "stroke-dasharray": data.strokes[t.line.dash] }));
      svg.append(draw_path({
        d: data.glyphs[String(t.marker.symbol).replace("-open", "")], transform: "translate(13 7)",
        fill: open ? "var(--ground)" : color, stroke: color, "stroke-width": open ? "1.5" : "",
      }));
      const button = make("button", { type: "button" }, svg, t.legendgroup);
      button.setAttribute("aria-pressed", String(!state[name].hidden.has(t.legendgroup)));
      button.addEventListener("click", () => {
        const hidden = state[name].hidden;
        hidden.delete(t.legendgroup) || hidden.add(t.legendgroup);
        draw(name);
      });
      if (!touch.matches) {
        button.addEventListener("pointerenter", () => fade(name, t.legendgroup));
        button.addEventListener("pointerleave", () => fade(name, null));
      }
      return button;
    }));
    if (focus >= 0) box.children[focus]?.focus();
  };

  const fade = (name, group) => {
    const node = $(`plot-${name}`);
    Plotly.restyle(node, { opacity: node.data.map((t) => (!group || t.legendgroup === group ? 1 : 0.12)) });
  };

  for (const [name, views] of Object.entries(data.figures)) {
    const box = $(`plot-${name}`).closest("figure").querySelector(".views");
    box?.append(...views.map((view, index) => {
      const button = make("button", { type: "button", textContent: view.name });
      button.setAttribute("aria-pressed", String(index === 0));
      button.addEventListener("click", () => {
        state[name].view = index;
        [...box.children].forEach((other, i) => other.setAttribute("aria-pressed", String(i === index)));
        draw(name);
      });
      return button;
    }));
  }

  // Attention maps.
  const picked = { mechanism: 0, layer: 0, head: 0, show: 0, query: null };
  const unpack = (text) => {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    return Float32Array.from({ length: bytes.length / 2 }, (_, i) => (bytes[2 * i] | (bytes[2 * i + 1] << 8)) / 65535);
  };
  const weights_of = (maps, layer, head) => {
    const weights = unpack(maps.layers[layer][head]), sizes = picked.show === 1 && maps.values[layer]?.[head], columns = maps.shape[1];
    if (!sizes) return weights;
    const weighted = weights.map((w, i) => w * sizes[i % columns]), sums = new Float32Array(maps.shape[0]);
    weighted.forEach((w, i) => { sums[Math.floor(i / columns)] += w; });
    return weighted.map((w, i) => w / (sums[Math.floor(i / columns)] || 1));
  };
  const ramp = () => (is_dark() ? [[35, 35, 39], [0, 114, 178], [226, 243, 255]] : [[245, 243, 238], [0, 114, 178], [6, 34, 56]]);
  const shade = (colors, t) => {
    const [a, b] = t < 0.5 ? [colors[0], colors[1]] : [colors[1], colors[2]], u = t < 0.5 ? 2 * t : 2 * t - 1;
    return a.map((from, i) => Math.round(from + (b[i] - from) * u));
  };

  const options = (select, labels, chosen) => {
    select.replaceChildren(...labels.map((label, i) => make("option", { value: i, textContent: label, selected: i === chosen })));
  };

  const show_heads = () => {
    const maps = data.attention[picked.mechanism], [rows, columns] = maps.shape, colors = ramp(), box = $("heads");
    box.style.gridTemplateColumns = `repeat(${Math.max(...maps.layers.map((heads) => heads.length))}, minmax(0, 1fr))`;
    box.replaceChildren(...maps.layers.flatMap((heads, layer) => heads.map((head, index) => {
      const canvas = make("canvas", { width: columns, height: rows }), weights = weights_of(maps, layer, index);
      const context = canvas.getContext("2d"), image = context.createImageData(columns, rows);
      weights.forEach((w, i) => image.data.set([...shade(colors, Math.sqrt(w)), 255], 4 * i));
      context.putImageData(image, 0, 0);
      const button = make("button", { type: "button", title: `layer ${layer + 1}, head ${index + 1}` }, canvas);
      button.style.gridRow = layer + 1;
      button.style.gridColumn = index + 1;
      button.setAttribute("aria-label", button.title);
      button.setAttribute("aria-pressed", String(layer === picked.layer && index === picked.head));
      button.addEventListener("click", () => { pick({ layer, head: index }); });
      return button;
    })));
  };

  const show_map = () => {
    const maps = data.attention[picked.mechanism], [rows, columns] = maps.shape, node = $("plot-attention");
    const weights = weights_of(maps, picked.layer, picked.head);
    const square = rows === columns, labels = maps.tokens.map(visible);
    const key = (k) => (square ? `“${labels[k]}” (${k})` : `key ${k}`);
    const cells = (make_cell) => Array.from({ length: rows }, (_, q) => Array.from({ length: columns }, (_, k) => make_cell(q, k, weights[q * columns + k])));
    const figure = structuredClone(painted(data.map)), trace = figure.data[0];
    trace.z = cells((q, k, w) => (w > 0 || k <= q + columns - rows ? Math.sqrt(w) : null));
    trace.customdata = cells((q, k, w) => plain(`“${labels[q]}” (${q}) looks at ${key(k)}: ${w.toFixed(3)}`));
    trace.colorscale = ramp().map((c, i) => [i / 2, `rgb(${c.join(",")})`]);
    const ticks = rows <= 64 && !narrow.matches
      ? { tickmode: "array", tickvals: labels.map((_, i) => i), ticktext: labels.map(plain), tickangle: 0, tickfont: { size: rows > 40 ? 8.5 : 10 } } : {};
    Object.assign(figure.layout.xaxis, square ? ticks : {});
    Object.assign(figure.layout.yaxis, ticks);
    if (narrow.matches) { trace.showscale = false; figure.layout.margin = { l: 44, r: 6, t: 6, b: 40 }; }
    figure.layout.dragmode = false;
    const first = !node.data;
    const drawn = Plotly.react(node, figure.data, figure.layout, config("attention"));
    if (first) for (const event of ["plotly_hover", "plotly_click"]) node.on(event, (e) => read(e.points[0].y));
    read(picked.query ?? rows - 1);
    return drawn;
  };

  const read = (query) => {
    const maps = data.attention[picked.mechanism], [rows, columns] = maps.shape;
    const weights = weights_of(maps, picked.layer, picked.head).slice(query * columns, (query + 1) * columns);
    picked.query = query;
    if (rows !== columns) return $("reading").replaceChildren(`“${visible(maps.tokens[query])}” looks at ${columns} keys that are not these tokens.`);
    $("reading").replaceChildren(...maps.tokens.map((token, k) => {
      const span = make("span", { className: k === query ? "query" : "", textContent: token === "\n" ? "↵\n" : token });
      span.dataset.token = k;
      const share = Math.round(75 * Math.sqrt(weights[k]));
      if (share) span.style.background = `color-mix(in srgb, var(--c1) ${share}%, transparent)`;
      return span;
    }));
  };

  const pick = (change) => {
    Object.assign(picked, change);
    const maps = data.attention[picked.mechanism];
    picked.layer = Math.min(picked.layer, maps.layers.length - 1);
    picked.head = Math.min(picked.head, maps.layers[picked.layer].length - 1);
    if (picked.query !== null && picked.query >= maps.shape[0]) picked.query = null;
    options($("pick-mechanism"), data.attention.map((m, i, all) =>
      all.some((o, j) => j !== i && o.mechanism === m.mechanism) ? `${m.mechanism}, seed ${m.seed}` : m.mechanism), picked.mechanism);
    options($("pick-layer"), maps.layers.map((_, i) => i + 1), picked.layer);
    options($("pick-head"), maps.layers[picked.layer].map((_, i) => i + 1), picked.head);
    options($("pick-show"), maps.values[picked.layer] ? ["weights", "weights times value"] : ["weights"], picked.show);
    show_heads();
    return show_map();
  };

  if (data.attention.length) {
    for (const name of ["mechanism", "layer", "head", "show"]) $(`pick-${name}`).addEventListener("change", (e) => pick({ [name]: Number(e.target.value) }));
    $("reading").addEventListener("click", (e) => { if (e.target.dataset.token) read(Number(e.target.dataset.token)); });
  }

  // Reasons behind the signs of the law matrix.
  const tip = $("tip");
  const tell = (target) => {
    tip.textContent = target.dataset.tip;
    tip.hidden = false;
    const at = target.getBoundingClientRect(), own = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(12, Math.min(at.left + at.width / 2 - own.width / 2, innerWidth - own.width - 12))}px`;
    tip.style.top = `${at.top > own.height + 12 ? at.top - own.height - 6 : at.bottom + 6}px`;
  };
  for (const target of document.querySelectorAll("[data-tip]")) {
    for (const event of ["pointerenter", "focus", "click"]) target.addEventListener(event, () => tell(target));
    for (const event of ["pointerleave", "blur"]) target.addEventListener(event, () => { tip.hidden = true; });
  }
  addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });
  addEventListener("keydown", (e) => { if (e.key === "Escape") tip.hidden = true; });

  // Contents: mark the section in view.
  const links = new Map([...document.querySelectorAll("nav a")].map((a) => [a.hash.slice(1), a]));
  const watcher = new IntersectionObserver((entries) => {
    for (const e of entries) if (e.isIntersecting) links.forEach((a, id) => a.classList.toggle("here", id === e.target.id));
  }, { rootMargin: "-15% 0px -75% 0px" });
  document.querySelectorAll("main > section").forEach((s) => watcher.observe(s));

  const draw_all = () => {
    name_theme();
    const drawn = Object.keys(data.figures).map(draw);
    if (data.attention.length) drawn.push(pick({}));
    return Promise.all(drawn);
  };
  for (const [event, value] of [["beforeprint", true], ["afterprint", false]]) {
    addEventListener(event, () => { printing = value; draw_all(); });
  }
  draw_all().then(() => { root.dataset.ready = "yes"; });
})();
