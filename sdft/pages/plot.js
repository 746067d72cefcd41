// What charts share: scales with ticks at round numbers, lines, axes. As SVG, without a library.

function line(name, x1, y1, x2, y2) {
  return draw("line", { class: name, x1, y1, x2, y2 });
}

function axisName(text, transform) {
  return draw("text", { class: "axis-name", "text-anchor": "middle", transform }, text);
}

/** Maps values to pixels, with a margin around the intervals and ticks at round numbers. */
function scale(estimates, from, to) {
  const ends = estimates.flatMap(({ value, low, high }) => [value, low, high]).filter(Number.isFinite);
  let [low, high] = [Math.min(...ends), Math.max(...ends)];
  const margin = high > low ? (high - low) * 0.06 : Math.abs(high) * 0.1 || 1;
  [low, high] = [low - margin, high + margin];
  const rough = (high - low) / 5;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
  const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  const ticks = [];
  for (let n = Math.ceil(low / step); n * step <= high; n++) ticks.push(n * step);
  return { to: (value) => from + ((value - low) / (high - low)) * (to - from), ticks, digits };
}

function axisLines(across, up, frame) {
  const lines = [];
  for (const tick of across.ticks) {
    const x = across.to(tick);
    lines.push(line("ruled", x, frame.top, x, frame.bottom),
      draw("text", { x, y: frame.bottom + 18, "text-anchor": "middle", class: "tick" }, fixed(tick, across.digits)));
  }
  for (const tick of up.ticks) {
    const y = up.to(tick);
    lines.push(line("ruled", frame.left, y, frame.right, y),
      draw("text", { x: frame.left - 8, y: y + 4, "text-anchor": "end", class: "tick" }, fixed(tick, up.digits)));
  }
  return lines;
}
