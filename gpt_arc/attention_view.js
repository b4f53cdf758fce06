function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element[key] = value;
  element.append(...children);
  return element;
}
const schemes = matchMedia("(prefers-color-scheme: dark)");
// Attention maps: a square for each head of each layer, and the chosen one large. A row is a query, a column a key.
function attentionView({tokens, layers, heads, weights}) {
  const size = tokens.length, levels = Uint8Array.from(atob(weights), letter => letter.charCodeAt(0));
  const share = (map, query, key) => levels[(map * size + query) * size + key] / 255;
  const percent = value => `${(100 * value).toFixed(1)}%`, quoted = place => JSON.stringify(tokens[place]);
  let map = 0, query = size - 1;

  function paint(canvas, number) {
    canvas.width = canvas.height = size;
    const context = canvas.getContext("2d"), color = getComputedStyle(document.documentElement).getPropertyValue("--mark").trim();
    context.fillStyle = color;
    for (let row = 0; row < size; row++)
      for (let column = 0; column < size; column++) {
        const value = share(number, row, column);
        if (column > row && !value) continue;  // the future is blank, and what is seen without attention is pale
        context.globalAlpha = 0.06 + 0.94 * Math.sqrt(value);
        context.fillRect(column, row, 1, 1);
      }
  }
  const all = make("div", {className: "all"});
  all.style.gridTemplateColumns = `auto repeat(${heads}, auto)`;
  all.append(make("span"), ...Array.from({length: heads}, (_, head) => make("span", {textContent: `head ${head + 1}`})));
  const buttons = [];
  for (let layer = 0; layer < layers; layer++) {
    all.append(make("span", {textContent: `layer ${layer + 1}`}));
    for (let head = 0; head < heads; head++) {
      const number = layer * heads + head;
      const button = make("button", {type: "button", ariaLabel: `layer ${layer + 1}, head ${head + 1}`}, make("canvas"));
      button.addEventListener("click", () => { map = number; show(); });
      buttons.push(button);
      all.append(button);
    }
  }
  const large = make("canvas"), title = make("strong"), seen = make("div", {className: "seen"});
  const slider = make("input", {type: "range", min: 0, max: size - 1, step: 1, value: query});
  const words = make("div", {className: "words"}, ...tokens.map(text => make("span", {textContent: text})));
  function show() {
    buttons.forEach((button, number) => { button.ariaPressed = String(number === map); });
    title.textContent = buttons[map].ariaLabel;
    paint(large, map);
    look();
  }
  function look(key = null) {
    slider.value = query;
    [...words.children].forEach((word, place) => {
      word.style.setProperty("--share", Math.sqrt(share(map, query, place)));
      word.className = place === query ? "query" : "";
    });
    const most = tokens.map((_, place) => place).sort((a, b) => share(map, query, b) - share(map, query, a)).slice(0, 5);
    const list = (key === null ? most.filter(place => share(map, query, place)) : [key]);
    seen.textContent = `Token ${query + 1}, ${quoted(query)}, attends to ` +
      list.map(place => `${quoted(place)} (${place + 1}) ${percent(share(map, query, place))}`).join(", ");
  }
  slider.addEventListener("input", () => { query = +slider.value; look(); });
  large.addEventListener("pointermove", event => {
    const box = large.getBoundingClientRect();
    const place = (value, from, length) => Math.min(Math.max(Math.floor((value - from) / length * size), 0), size - 1);
    query = place(event.clientY, box.top, box.height);
    look(place(event.clientX, box.left, box.width));
  });
  large.addEventListener("pointerleave", () => look());
  const paintAll = () => { buttons.forEach((button, number) => paint(button.firstChild, number)); show(); };
  schemes.addEventListener("change", paintAll);
  paintAll();
  return make("div", {className: "attention"}, make("div", {className: "wide", tabIndex: 0, role: "group", ariaLabel: "heads"}, all),
    make("div", {className: "one"}, make("div", {}, title, large),
      make("div", {}, make("label", {}, "token that attends", slider), words, seen)));
}
