// The list of conversations: one listener for all rows. `element` and `trigger` come from Gradio.
const row = (node) => node.closest("li[data-id]");

element.addEventListener("click", (event) => {
  const item = row(event.target);
  if (!item) return;
  const id = item.dataset.id;
  if (event.target.closest(".delete")) trigger("delete", { id });
  else if (event.target.closest(".rename")) edit(item);
  else if (event.target.closest(".title")) trigger("select", { id });
});

element.addEventListener("dblclick", (event) => {
  const item = row(event.target);
  if (item && event.target.closest(".title")) edit(item);
});

// The title becomes a field: Enter or leaving it keeps the new title, Escape the old one.
function edit(item) {
  const title = item.querySelector(".title");
  const id = item.dataset.id; // the list may be made anew, and this row be another one's, before the edit ends
  if (!title || item.querySelector("input")) return;
  const field = document.createElement("input");
  field.value = title.textContent;
  field.maxLength = 200;
  field.setAttribute("aria-label", item.querySelector(".rename").title);
  title.hidden = true;
  item.insertBefore(field, title);
  field.focus();
  field.select();
  let over = false; // removing the field blurs it, which must not end the edit twice
  const end = (keep) => {
    if (over) return;
    over = true;
    const text = field.value.trim();
    field.remove();
    title.hidden = false;
    if (keep && text && text !== title.textContent) {
      title.textContent = text;
      trigger("edit", { id, title: text });
    }
  };
  field.addEventListener("blur", () => end(true));
  field.addEventListener("keydown", (event) => {
    if (event.isComposing || event.keyCode === 229) return;
    if (event.key === "Enter") end(true);
    if (event.key === "Escape") end(false);
  });
}
