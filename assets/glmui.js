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
    .replace(/(\n\n<small[^<]*<\/small>)+$/, "")
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
      if (window.innerWidth > 900) return;
      document.querySelectorAll("#left.open .toggle-button, #right.open .toggle-button").forEach((b) => b.click());
    },
    // What stands in the middle: "" is the chat, else the area of that name. It is kept in the address,
    // so that the browser's Back leads out of it.
    view: (name, place) => {
      if (name) location.hash = name;
      else if (location.hash) history.pushState(null, "", location.pathname + location.search);
      showView();
      window.glmui.closeSideOnPhone();
      const target = place && document.getElementById(place);
      target?.scrollIntoView({ block: "start" });
      target?.parentElement.querySelector(`#${place} ~ * input`)?.focus({ preventScroll: true });
    },
    language: (code) => {
      document.cookie = `glmui_language=${code}; path=/; max-age=31536000; samesite=strict`;
      const url = new URL(location.href);
      url.pathname = "/";
      location.assign(url);
    },
  };

  document.addEventListener("click", (event) => {
    const button = event.target.closest?.("[data-glmui]");
    if (!button || button.closest("#thread")) return;
    const [name, ...given] = button.dataset.glmui.split(":");
    window.glmui[name]?.(...given);
  });

  document.addEventListener("click", (event) => {
    if (event.target.closest?.("#new, .conversations .title")) window.glmui.view("");
  });

  const showView = () => {
    const name = location.hash.slice(1);
    const known = name && document.querySelector(`#middle > .view#${CSS.escape(name)}`);
    document.documentElement.dataset.view = known ? name : "";
    for (const button of document.querySelectorAll("[data-glmui^='view:']")) {
      const here = known && button.dataset.glmui === `view:${name}`;
      if (here) button.setAttribute("aria-current", "page");
      else button.removeAttribute("aria-current");
    }
  };
  window.addEventListener("hashchange", showView);
  window.addEventListener("popstate", showView);
  document.addEventListener("keydown", (event) => {
    const free = event.key === "Escape" && !event.isComposing && !document.querySelector(":popover-open");
    if (free && document.documentElement.dataset.view) window.glmui.view("");
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

  // A slider that is moved by keys never tells Gradio that it has come to rest: only a pointer does.
  let rest;
  document.addEventListener("pointerdown", () => clearTimeout(rest));
  document.addEventListener("change", (event) => {
    const slider = event.target;
    if (!slider.matches?.("#layers input[type=range]")) return;
    clearTimeout(rest);
    rest = setTimeout(() => slider.dispatchEvent(new PointerEvent("pointerup", { bubbles: true })), 400);
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
    const newPlace = document.querySelector("#places button:not([data-seen]), #middle > .view:not([data-seen])");
    if (newPlace) {
      newPlace.dataset.seen = "yes";
      showView();
    }
  }).observe(document.documentElement, { childList: true, subtree: true });
})();
