// The pictures that a concept is tuned on. `props.value` is [{name, picture, caption, masked, said}]; what is typed is handed
// over as {name, caption} of the one that was changed, by the event `caption`; `paint` and `away` name a picture, too.
const list = element.querySelector(".pictures");
const waiting = {}; // what was typed and is not handed over yet, by picture
let timer = null;

function handOver() {
  clearTimeout(timer);
  for (const [name, caption] of Object.entries(waiting)) {
    delete waiting[name];
    trigger("caption", { name, caption });
  }
}

function itemOf(one) {
  const picture = one.picture ? make("img", { src: one.picture, alt: "" }) : make("div", { class: "blank" });
  const caption = make("textarea", { "data-name": one.name, value: waiting[one.name] ?? one.caption, rows: 2, placeholder: "No caption: a photo of a <name>", "aria-label": `Caption of ${one.name}` });
  const button = (act, text) => make("button", { type: "button", "data-act": act, "data-name": one.name, textContent: text, "aria-label": `${text}: ${one.name}` });
  const row = make("div", { class: "row" }, button("paint", one.masked ? "Paint its mask anew" : "Paint its mask"), button("away", "Take away"));
  const said = one.said.map((text) => make("p", { textContent: text }));
  return make("li", {}, picture, make("div", { class: "rest" }, make("span", { class: "name", textContent: one.name }), caption, row, ...said));
}

function show() {
  const typing = list.contains(document.activeElement) ? document.activeElement : null;
  const [name, tag] = typing ? [typing.dataset.name, typing.tagName] : [];
  const place = typing?.selectionStart;
  list.replaceChildren(...(props.value || []).map(itemOf));
  const again = name && [...list.querySelectorAll(tag)].find((one) => one.dataset.name === name);
  again?.focus();
  if (tag === "TEXTAREA") again?.setSelectionRange(place, place);
}

list.addEventListener("input", ({ target }) => {
  waiting[target.dataset.name] = target.value;
  clearTimeout(timer);
  timer = setTimeout(handOver, 400);
});
list.addEventListener("focusout", handOver);
list.addEventListener("click", ({ target }) => {
  if (target.dataset.act) {
    handOver();
    trigger(target.dataset.act, { name: target.dataset.name });
  }
});
watch("value", show);
show();
