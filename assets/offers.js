// What is offered for a message, or a reply that is to be made anew or to go on, that memory has no room for. `element` and `trigger` come from Gradio.
const box = () => document.querySelector("#box textarea");

let taken = false; // a double click takes one offer
new MutationObserver(() => {
  taken = false;
  element.querySelector("[data-act]")?.focus();
}).observe(element, { childList: true, subtree: true });

const take = (act) => {
  if (taken) return;
  taken = true;
  setTimeout(() => { taken = false; }, 1000); // where an error came of it, another may be taken
  const { wish } = element.querySelector(".offers").dataset; // "" for the message in the box
  if (!wish) box()?.focus();
  trigger("select", { act, wish });
};

element.addEventListener("click", (event) => {
  const button = event.target.closest("[data-act]");
  if (button) take(button.dataset.act);
});

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !event.isComposing && element.querySelector("[data-act]")) take("cancel");
});
