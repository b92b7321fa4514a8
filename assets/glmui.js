// Small things only a browser can do. Loaded in the page's head.
(() => {
  // Gradio words its own few buttons by the browser's language: let it be the page's.
  const tag = document.currentScript?.src.includes("?zh-") ? "zh-CN" : "en";
  Object.defineProperty(navigator, "language", { get: () => tag });
  Object.defineProperty(navigator, "languages", { get: () => [tag] });
  document.documentElement.lang = tag;

  // Enter that ends an IME composition must not send half-typed pinyin. Safari ends the composition
  // before it reports the key, hence the short memory.
  let composedAt = 0;
  document.addEventListener("compositionend", () => { composedAt = Date.now(); }, true);
  for (const kind of ["keydown", "keypress"]) {
    document.addEventListener(kind, (event) => {
      const composing = event.isComposing || event.keyCode === 229 || Date.now() - composedAt < 80;
      if (event.key === "Enter" && composing) event.stopImmediatePropagation();
    }, true);
  }

  // Light, dark or as the system has it; kept in this browser.
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const themes = ["system", "light", "dark"];
  const paint = () => {
    const wish = localStorage.getItem("glmui-theme") || "system";
    const button = document.querySelector("[data-themes]"); // its words, in the order of `themes`
    if (button) button.textContent = button.dataset.themes.split("|")[themes.indexOf(wish)];
    const on = wish === "dark" || (wish === "system" && dark.matches);
    document.documentElement.dataset.theme = wish;
    document.body?.classList.toggle("dark", on);
  };
  dark.addEventListener("change", paint);
  paint();
  document.addEventListener("DOMContentLoaded", paint);

  // A message is shown with a few characters written as entities and with notes under it (ui/markdown.py,
  // ui/present.py); whoever copies it wants its text.
  const asWritten = (shown) => shown
    .replace(/(\n\n<small>[^<]*<\/small>)+$/, "")
    .replace(/&#60;/g, "<")
    .replace(/<span>&#36;<\/span>/g, "$")
    .replace(/&#33;\[/g, "![");
  let copyingMessage = false;
  document.addEventListener("click", (event) => {
    copyingMessage = Boolean(event.target.closest?.("#thread .message-buttons"));
  }, true);
  const write = navigator.clipboard?.writeText.bind(navigator.clipboard);
  if (write) navigator.clipboard.writeText = (text) => write(copyingMessage ? asWritten(text) : text);

  window.glmui = {
    // Which page this is; a copied tab is another one. The conversation it shows stands in its address.
    tab: `${Date.now()}-${Math.random().toString(36).slice(2)}`,
    wished: () => new URLSearchParams(location.search).get("c") || "",
    address: (id) => {
      const url = new URL(location.href);
      if (id) url.searchParams.set("c", id);
      else url.searchParams.delete("c");
      history.replaceState(null, "", url);
      return id;
    },
    theme: () => {
      const now = localStorage.getItem("glmui-theme") || "system";
      localStorage.setItem("glmui-theme", themes[(themes.indexOf(now) + 1) % 3]);
      paint();
    },
    closeSideOnPhone: () => {
      if (window.innerWidth <= 900) document.querySelector("#left.open .toggle-button")?.click();
    },
    language: (code) => {
      document.cookie = `glmui_language=${code}; path=/; max-age=31536000; samesite=strict`;
      const url = new URL(location.href);
      url.pathname = "/";
      location.assign(url);
    },
  };

  document.addEventListener("click", (event) => {
    const button = event.target.closest?.("#looks [data-glmui]");
    if (!button) return;
    const [name, argument] = button.dataset.glmui.split(":");
    window.glmui[name]?.(argument);
  });

  document.addEventListener("click", (event) => {
    if (event.target.closest?.("#new")) window.glmui.closeSideOnPhone();
  });

  // The thread stays at its end while a reply grows, unless the reader has scrolled up; earlier messages
  // that are put in above leave the reader where they were.
  const keepPlace = (thread) => {
    let atEnd = true, height = 0, place = 0;
    const scroller = () => thread.querySelector(".bubble-wrap") || thread;
    thread.addEventListener("scroll", () => {
      const box = scroller();
      if (box.scrollHeight !== height) return; // not the reader's doing
      atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 60;
      place = box.scrollTop;
    }, true);
    new MutationObserver(() => {
      const box = scroller();
      const grownAbove = Date.now() - earlierAt < 3000 && box.scrollHeight > height;
      if (grownAbove) box.scrollTop = place + box.scrollHeight - height;
      else if (atEnd) box.scrollTop = box.scrollHeight;
      height = box.scrollHeight;
      if (atEnd || grownAbove) place = box.scrollTop;
    }).observe(thread, { childList: true, subtree: true, characterData: true });
    window.glmui.toEnd = () => { atEnd = true; };
  };
  let earlierAt = 0;
  document.addEventListener("click", (event) => {
    if (event.target.closest?.("#earlier")) earlierAt = Date.now();
    else if (event.target.closest?.(".conversations .title, #new, .submit-button")) window.glmui.toEnd?.();
  }, true);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && event.target.closest?.("#box")) window.glmui.toEnd?.();
  });

  // What Gradio leaves without a name or makes later than this script runs.
  const words = { en: { send: "Send", stop: "Stop" }, "zh-CN": { send: "发送", stop: "停止" } }[tag];
  new MutationObserver(() => {
    document.querySelector("#box .submit-button")?.setAttribute("aria-label", words.send);
    document.querySelector("#box .stop-button")?.setAttribute("aria-label", words.stop);
    const thread = document.querySelector("#thread");
    if (thread && !thread.dataset.kept) {
      thread.dataset.kept = "yes";
      keepPlace(thread);
      paint();
    }
  }).observe(document.documentElement, { childList: true, subtree: true });
})();
