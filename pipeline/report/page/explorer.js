// The feature explorer of a report's page. Python writes each run as one JSON block (explorer.py); this
// parses a block when its run is chosen, and makes elements only for one page of the list and for one feature.
// Text goes into the page as text nodes and attributes only.
"use strict";
(() => {
  const PAGE = 40; // features per page of the list
  const WINDOW = [24, 12]; // tokens shown before and after the largest activation, unless whole contexts are
  const TICK = 16; // positions between numbers in the text
  const LEVELS = 127; // excerpts hold activations as this many steps up to the feature's largest
  const STRONG = 64; // about half of the largest: tokens that a search finds

  const root = document.getElementById("explorer");
  const blocks = document.querySelectorAll("script.explored");
  const controls = root.querySelector("form").elements;
  const [head, body] = ["thead", "tbody"].map((tag) => root.querySelector(".list " + tag));
  const pager = root.querySelector(".pager");
  const pane = root.querySelector(".feature");

  const COLUMNS = [
    // Name, explanation, sort key, and text.
    ["feature", "row of the decoder", (f) => f.number, (f) => String(f.number)],
    ["density", "share of tokens on which it fires", (f) => f.density, (f) => share(f.density)],
    ["specificity", "mutual information of firing and position range, in bits",
      (f) => f.specificity, (f) => small(f.specificity)],
    ["bits/firing", "specialisation: bits of information about the position range per firing, above chance",
      (f) => f.specialisation, (f) => bits(f.specialisation)],
    ["peak", "largest activation, by absolute value",
      (f) => Math.abs(f.excerpts[0][1]), (f) => number(f.excerpts[0][1])],
  ];

  let run, shown, chosen, wanted;
  let sorting = { column: 2, falls: true };
  let page = 0;
  const parsed = new Map();

  // Elements

  function element(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  }

  function drawing(width, height, ...children) {
    const viewBox = `0 0 ${width} ${height}`;
    const made = svg("svg", { viewBox, width, height, preserveAspectRatio: "none" });
    made.append(...children);
    return made;
  }

  function svg(tag, attributes) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    return made;
  }

  // Numbers

  const share = (x) => (x >= 0.1 ? (100 * x).toFixed(0) : x >= 0.001 ? (100 * x).toFixed(2 - (x >= 0.01))
    : (100 * x).toPrecision(1)) + " %";
  const number = (x) => (Math.abs(x) >= 100 || x === 0 ? x.toFixed(0) : x.toPrecision(3));
  const count = (x) => x.toLocaleString("en");
  const signed = (x) => (x > 0 ? "+" : "") + number(x);
  const bits = (x) => x.toFixed(2).replace("-0.00", "0.00");
  const small = (x) => (x >= 0.0001 || x === 0 ? x.toFixed(4) : x.toExponential(0));

  // A run

  function read(which) {
    if (!parsed.has(which)) {
      const data = JSON.parse(blocks[which].textContent);
      data.byNumber = new Map(data.features.map((feature) => [feature.number, feature]));
      parsed.set(which, data);
    }
    return parsed.get(which);
  }

  function levels(excerpt) {
    const bytes = atob(excerpt[3]);
    const values = new Int8Array(bytes.length);
    for (let i = 0; i < bytes.length; i++) values[i] = bytes.charCodeAt(i); // fast: a search decodes all
    return values;
  }

  /** The tokens on which a feature is strong in its excerpts, each once, the strongest first. */
  function strongTokens(feature) {
    if (!feature.strong) {
      const largest = new Map();
      for (const excerpt of feature.excerpts) {
        const [tokens, values] = [run.tokens[excerpt[0]], levels(excerpt)];
        for (let i = 0; i < values.length; i++) {
          const size = Math.abs(values[i]);
          if (size >= STRONG && size > (largest.get(tokens[i]) || 0)) largest.set(tokens[i], size);
        }
      }
      feature.strong = [...largest].sort((a, b) => b[1] - a[1]).map(([token]) => run.texts[token]);
    }
    return feature.strong;
  }

  // The list

  function choose() {
    const query = controls.token.value.toLowerCase();
    wanted = /^\s*#\d+\s*$/.test(query) ? Number(query.trim().slice(1)) : null;
    const matches = run.features.filter((feature) => wanted !== null ? feature.number === wanted
      : !query || strongTokens(feature).some((text) => text.toLowerCase().includes(query)));
    const value = COLUMNS[sorting.column][2];
    const sign = sorting.falls ? -1 : 1;
    matches.sort((a, b) => sign * (value(a) - value(b)) || a.number - b.number);
    shown = matches;
    page = 0;
    controls.matches.value = query ? `${matches.length} of ${run.features.length} features` : "";
    if (!matches.includes(chosen)) chosen = matches[0];
    showList();
    showFeature();
  }

  function showList() {
    head.replaceChildren(element("tr", {}, ...COLUMNS.map(([name, about], index) => {
      const isSorted = index === sorting.column;
      const arrow = isSorted ? (sorting.falls ? " ↓" : " ↑") : "";
      const button = element("button", { type: "button", title: about }, name + arrow);
      button.addEventListener("click", () => {
        sorting = { column: index, falls: isSorted ? !sorting.falls : index !== 0 };
        choose();
      });
      const order = isSorted ? { "aria-sort": sorting.falls ? "descending" : "ascending" } : {};
      return element("th", order, button);
    }), element("th", {}, "tokens")));
    body.replaceChildren(...shown.slice(page * PAGE, (page + 1) * PAGE).map(listed));
    const nPages = Math.ceil(shown.length / PAGE);
    const last = Math.min(shown.length, (page + 1) * PAGE);
    const where = shown.length ? `${page * PAGE + 1}-${last} of ${shown.length}` : noMatch();
    const [earlier, later] = [turn("‹", page > 0, -1), turn("›", page + 1 < nPages, 1)];
    pager.replaceChildren(earlier, element("span", {}, where), later);
  }

  /** Why the list is empty. */
  function noMatch() {
    if (wanted === null) return "no feature matches";
    if (wanted >= run.nFeatures) return `no feature #${wanted}: the run has ${count(run.nFeatures)}`;
    return `#${wanted} is not among the ${count(run.features.length)} features shown: it never fired, `
      + "or the page needs a larger --features";
  }

  function listed(feature) {
    const row = element("tr", { "data-feature": feature.number, tabindex: 0 },
      ...COLUMNS.map(([, , , text]) => element("td", {}, text(feature))),
      element("td", { class: "tokens" },
        ...strongTokens(feature).slice(0, 8).map((text) => element("span", {}, visible(text)))));
    if (feature === chosen) row.setAttribute("aria-current", "true");
    row.addEventListener("click", () => select(feature));
    return row;
  }

  function turn(text, isThere, step) {
    const button = element("button", { type: "button", title: step < 0 ? "earlier" : "later" }, text);
    button.disabled = !isThere;
    button.addEventListener("click", () => {
      page += step;
      showList();
    });
    return button;
  }

  function select(feature) {
    chosen = feature;
    if (shown.includes(feature)) page = Math.floor(shown.indexOf(feature) / PAGE);
    showList();
    showFeature();
  }

  function step(event) {
    const by = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (event.key !== "Enter" && !by) return;
    event.preventDefault();
    const focused = run.byNumber.get(Number(event.target.dataset.feature));
    const next = by ? shown[shown.indexOf(focused ?? chosen) + by] : focused;
    if (!next) return;
    select(next);
    body.querySelector(`[data-feature="${next.number}"]`).focus();
  }

  // One feature

  function showFeature() {
    pane.replaceChildren();
    if (!chosen) return;
    const [context, peak, position] = chosen.excerpts[0];
    const facts = [
      `fires on ${share(chosen.density)} of tokens`,
      `peak ${number(peak)} at position ${position} of context ${context}`,
      `specificity ${small(chosen.specificity)} bits, ${chosen.isAboveChance ? "above" : "not above"} chance`,
      `${bits(chosen.specialisation)} bits per firing`,
    ];
    pane.append(
      element("h3", {}, `feature ${chosen.number}`),
      element("p", { class: "facts" }, facts.join(" · ")),
      element("div", { class: "profiles" }, profile("density by position", chosen.densityByPosition, share),
        profile("mean activation by position", chosen.meanByPosition, number)),
      rangeTable(),
      element("h4", {}, "nearest directions, by cosine"), neighbours(),
      element("h4", {}, "largest activations"), ...chosen.excerpts.map(excerpt),
    );
  }

  /** Bars by position, up and down from a line at 0. */
  function profile(name, values, show) {
    const [low, high] = [Math.min(0, ...values), Math.max(0, ...values)];
    const most = high > -low ? high : low;
    const y = (value) => 1 + (48 * (high - value)) / (high - low || 1);
    const wide = 320 / values.length;
    const bars = values.map((value, i) =>
      `M${(i * wide).toFixed(2)} ${y(0)}V${y(value).toFixed(2)}h${(wide * 0.85).toFixed(2)}V${y(0)}z`);
    const chart = drawing(320, 50, svg("path", { d: bars.join(""), class: "bars" }), edges(320, 50),
      svg("path", { d: `M0 ${y(0)}h320`, class: "axis" }));
    chart.append(title(`${name} in ${values.length} bins of positions`));
    const heading = element("h4", {}, name, element("span", {}, `${most < 0 ? "down" : "up"} to ${show(most)}`));
    return element("div", { class: "profile" }, heading, chart, scale());
  }

  /** Lines where position ranges begin. */
  function edges(width, height) {
    const starts = run.ranges.slice(1).map(([start]) => ((width * start) / run.length).toFixed(2));
    return svg("path", { d: starts.map((x) => `M${x} 0v${height}`).join(""), class: "edges" });
  }

  function scale() {
    const starts = run.ranges.map(([start]) => start);
    const few = starts.filter((_, i) => i % Math.ceil(starts.length / 8) === 0);
    return element("div", { class: "scale" }, ...few.map((start) =>
      element("span", { style: `left: ${(100 * start) / run.length}%` }, String(start))),
      element("span", { class: "last" }, String(run.length)));
  }

  function title(text) {
    const made = svg("title", {});
    made.textContent = text;
    return made;
  }

  function rangeTable() {
    const { densityByRange: density, meanByRange: mean, baseByRange: base, decoderByRange: cosine } = chosen;
    const rows = [["density", density.map(share)], ["mean activation", mean.map(number)]];
    if (base) {
      rows.push(["without adapter", base.map(number)]);
      rows.push(["added by the adapter", mean.map((value, r) => signed(value - base[r]))]);
    }
    if (cosine) rows.push(["cosine of adapted direction", cosine.map((x) => x.toFixed(3))]);
    return element("div", { class: "wide" }, element("table", { class: "ranges" },
      element("tr", {}, element("th", {}, "positions"),
        ...run.ranges.map(([start, stop]) => element("th", {}, `${start}:${stop}`))),
      ...rows.map(([name, values]) => element("tr", {}, element("th", {}, name),
        ...values.map((value) => element("td", {}, value))))));
  }

  function neighbours() {
    return element("p", { class: "neighbours" }, ...chosen.neighbours.map(([other, cosine]) => {
      const feature = run.byNumber.get(other);
      const text = `${other} (${cosine.toFixed(2)})`;
      if (!feature) return element("span", { title: "not among the features shown" }, text);
      const button = element("button", { type: "button" }, text);
      button.addEventListener("click", () => select(feature));
      return button;
    }));
  }

  function excerpt(shownExcerpt) {
    const [context, peak, position] = shownExcerpt;
    const values = levels(shownExcerpt);
    const tokens = run.tokens[context];
    const [start, stop] = controls.whole.checked ? [0, tokens.length]
      : [Math.max(0, position - WINDOW[0]), Math.min(tokens.length, position + WINDOW[1] + 1)];
    const text = element("p", { class: "text" });
    if (start > 0) text.append("… ");
    const unit = Math.abs(chosen.excerpts[0][1]) / LEVELS;
    for (let i = start; i < stop; i++) {
      if (i % TICK === 0) text.append(element("sup", {}, String(i)));
      text.append(token(tokens[i], i, values[i], unit, i === position));
    }
    if (stop < tokens.length) text.append(" …");
    const ends = [element("span", {}, "0"), `context ${context}`, element("span", {}, String(run.length))];
    const where = element("div", { class: "where" }, element("b", {}, number(peak)), ` at ${position}`,
      ruler(values, position), element("small", {}, ...ends));
    return element("div", { class: "excerpt" }, where, text);
  }

  function token(index, position, level, unit, isPeak) {
    const about = `position ${position}, token ${run.ids[index]}: ${level ? number(level * unit) : "0"}`;
    const made = element("span", { title: about }, visible(run.texts[index]));
    const colour = level > 0 ? "213, 94, 0" : "0, 114, 178";
    if (level) made.style.background = `rgba(${colour}, ${(0.85 * Math.abs(level)) / LEVELS})`;
    if (isPeak) made.className = "peak";
    return made;
  }

  /** The whole context as bars, with a mark at the largest and lines where ranges begin. */
  function ruler(values, position) {
    const wide = 128 / values.length;
    let bars = "";
    values.forEach((level, i) => {
      const [x, up] = [i * wide, (-14 * level) / LEVELS].map((value) => value.toFixed(2));
      if (level) bars += `M${x} 20v${up}h${wide}V20z`;
    });
    const mark = ((position + 0.5) * wide).toFixed(2);
    const high = values.some((level) => level < 0) ? 35 : 21;
    const made = drawing(128, high, edges(128, high),
      svg("path", { d: bars, class: "bars" }), svg("path", { d: "M0 20h128", class: "axis" }),
      svg("path", { d: `M${mark} 5l-3 -5h6z`, class: "mark" }));
    made.append(title(`activation at each of ${values.length} positions; the largest at ${position}`));
    return made;
  }

  /** A token's text with whitespace made visible. */
  function visible(text) {
    return text.replace(/\n/g, "↵").replace(/\t/g, "→").replace(/\r/g, "␍") || "∅";
  }

  // Start

  /** What was scanned, and which features are shown. */
  function about() {
    const [start, stop] = run.contexts;
    const isAll = run.features.length === run.nFired;
    const shown = isAll ? "all of them" : `${count(run.features.length)} of them: half have the largest `
      + "specificity, the others are spread evenly by density";
    return `${run.folder}, layer ${run.layer}. Of ${count(run.nFeatures)} features ${count(run.nFired)} fired `
      + `on ${count(run.nTokens)} ordinary tokens of the held-out contexts ${start}:${stop}; this page shows ${shown}.`
      + (run.note ? ` Token ids are shown instead of text: ${run.note}.` : "");
  }

  function open() {
    run = read(Number(controls.run.value));
    root.querySelector(".about").textContent = about();
    chosen = undefined;
    choose();
  }

  root.querySelector("form").addEventListener("submit", (event) => event.preventDefault());
  controls.run.addEventListener("change", open);
  controls.token.addEventListener("input", choose);
  controls.whole.addEventListener("change", showFeature);
  body.addEventListener("keydown", step);
  open();
})();
