// The shelf: a card for each concept, to be ticked, with how strong it is to be. `props.cards` are the concepts, whose texts
// are strangers'; `props.value` is {word: strength} of those that are ticked.
const shelf = element.querySelector(".shelf");
let chosen = {};

function cardOf(one) {
  const on = one.word in chosen, strength = chosen[one.word] ?? 1;
  const tick = make("input", { type: "checkbox", checked: on, "data-word": one.word });
  const shared = { disabled: !on, "data-word": one.word };
  const slider = make("input", { type: "range", min: 0, max: 1.5, step: 0.01, value: Math.min(strength, 1.5), ...shared });
  const figure = make("input", { type: "number", min: 0, max: 100, step: "any", value: strength, "aria-label": `Strength of ${one.word}`, ...shared });
  const picture = one.picture ? make("img", { src: one.picture, alt: "" }) : make("div", { class: "blank" });
  const name = make("label", { class: "name" }, tick, make("span", { textContent: one.word }));
  const strong = make("div", { class: "strength" }, make("label", {}, "Strength", slider), figure);
  return make("li", { class: on ? "on" : "" }, picture, name, make("p", { textContent: one.title }), strong);
}

function show() {
  const { word, type } = document.activeElement?.dataset?.word && shelf.contains(document.activeElement) ? { word: document.activeElement.dataset.word, type: document.activeElement.type } : {};
  shelf.replaceChildren(...(props.cards || []).map(cardOf));
  if (word) [...shelf.querySelectorAll("input")].find((input) => input.dataset.word === word && input.type === type)?.focus();
}

shelf.addEventListener("input", ({ target }) => {
  const ticking = target.type === "checkbox";
  if (!ticking && Number.isNaN(target.valueAsNumber)) return; // half typed
  if (!ticking) {
    chosen[target.dataset.word] = target.valueAsNumber;
    for (const other of target.closest(".strength").querySelectorAll("input")) if (other !== target) other.value = target.valueAsNumber;
  } else if (target.checked) chosen[target.dataset.word] = 1;
  else delete chosen[target.dataset.word];
  props.value = { ...chosen };
  trigger("input");
  if (ticking) show();
});
watch("value", () => { if (JSON.stringify(props.value || {}) !== JSON.stringify(chosen)) { chosen = { ...props.value }; show(); } });
watch("cards", show);
chosen = { ...props.value };
show();
