// The buttons and small forms of the Models area and of the welcome. `element` and `trigger` come from Gradio.
const tell = (node, values = {}) => {
  const name = node.closest("[data-name]")?.dataset.name || "";
  trigger("select", { act: node.dataset.act, name, values });
};

element.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  if (button.dataset.copy) copy(button);
  else if (button.dataset.act && button.type !== "submit") tell(button);
});

element.addEventListener("submit", (event) => {
  event.preventDefault();
  const form = event.target;
  form.closest("[popover]")?.hidePopover();
  tell(event.submitter?.dataset.act ? event.submitter : form, Object.fromEntries(new FormData(form)));
});

// Without a clipboard (plain HTTP from another machine) the path is selected, ready to be copied by hand.
async function copy(button) {
  const text = button.parentElement.querySelector("code");
  try {
    await navigator.clipboard.writeText(text.textContent);
    button.classList.add("copied");
    setTimeout(() => button.classList.remove("copied"), 1500);
  } catch {
    getSelection().selectAllChildren(text);
  }
}
