// The planner: shows what the choices mean, from the numbers in planner-data.js.
(() => {
  const form = document.getElementById("planner-form");
  const data = window.neurmsPlanner;
  if (!form || !data) return;

  const digits = (value) => Number(value.toPrecision(3)).toString();

  function amount(value, units, step) {
    let index = 0;
    while (value >= 999.5 && index < units.length - 1) {
      value /= step;
      index += 1;
    }
    return `${digits(value)} ${units[index]}`;
  }

  const bytes = (value) => amount(value, ["B", "kB", "MB", "GB"], 1000);
  const time = (value) =>
    value === null ? "not timed" : amount(value * 1e6, ["µs", "ms", "s"], 1000);

  function fill(name, values, chosen, label = (value) => value) {
    for (const value of values) {
      form.elements[name].add(new Option(label(value), value, value === chosen, value === chosen));
    }
  }

  function cell(row, text, kind = "td") {
    const made = document.createElement(kind);
    made.textContent = text;
    if (kind === "th") made.scope = "row";
    row.append(made);
    return made;
  }

  function show() {
    const [size, ranks, rule] = ["size", "ranks", "rule"].map((name) => form.elements[name].value);
    const found = data.table[size][ranks];
    const base = found.AdamW.bytes;
    const own = found[rule];
    const where = ranks === "1" ? "on one rank" : `on each of ${ranks} ranks (FSDP2)`;
    document.getElementById("planner-answer").textContent =
      `${rule}, LLaMA of ${size}: ${bytes(own.bytes)} of state ${where}, ` +
      `${digits((100 * own.bytes) / base)} % of AdamW's; a step of the optimizer: ${time(own.seconds)}.`;

    const body = document.getElementById("planner-rows");
    body.replaceChildren();
    const most = Math.max(...data.rules.map((name) => found[name].bytes));
    for (const name of data.rules) {
      const row = document.createElement("tr");
      if (name === rule) row.className = "chosen";
      cell(row, name, "th");
      const state = cell(row, bytes(found[name].bytes));
      const bar = document.createElement("span");
      bar.className = "planner-bar";
      bar.style.width = `${(100 * found[name].bytes) / most}%`;
      state.append(bar);
      cell(row, time(found[name].seconds));
      body.append(row);
    }
  }

  fill("size", Object.keys(data.sizes), "130M");
  fill("ranks", data.ranks.map(String), "1");
  fill("rule", data.rules, "NeuRMS P");
  form.addEventListener("change", show);
  form.hidden = false;
  show();
})();
