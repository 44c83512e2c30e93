// What pages do beyond links and forms: tips, keys, and saying what went wrong. Everything here
// is an addition; a page without scripts shows the same numbers.

const tip = document.createElement("div");
tip.id = "tip";
tip.setAttribute("role", "tooltip");
tip.hidden = true;
document.body.append(tip);

const tippable = (node) =>
  node instanceof Element ? node.closest("[data-tip], .chart .role-mark [aria-label]") : null;

function show(node) {
  const text = node.dataset.tip ?? node.getAttribute("aria-label");
  if (!text) return;
  tip.textContent = text;
  tip.hidden = false;
  const at = node.getBoundingClientRect();
  const size = tip.getBoundingClientRect();
  const left = Math.min(Math.max(4, at.left), innerWidth - size.width - 4);
  const above = at.top - size.height - 6;
  tip.style.left = `${left}px`;
  tip.style.top = `${above > 4 ? above : at.bottom + 6}px`;
}

const hide = () => { tip.hidden = true; };

document.addEventListener("mouseover", (event) => {
  const node = tippable(event.target);
  node ? show(node) : hide();
});
document.addEventListener("focusin", (event) => {
  const node = tippable(event.target);
  node ? show(node) : hide();
});
document.addEventListener("focusout", hide);
document.addEventListener("scroll", hide, { passive: true });

const isTyping = (node) => node instanceof Element && node.matches("input, select, textarea");

// In a strip the arrow keys go from token to token; elsewhere to the neighbouring page.
function alongStrip(from, step) {
  const tokens = [...from.closest(".strip, .grid").querySelectorAll(".t")];
  const next = tokens[tokens.indexOf(from) + step];
  if (!next) return;
  from.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
}

function follow(rel) {
  const link = document.querySelector(`a[rel="${rel}"]`);
  if (link) link.click();
}

const keys = {
  ArrowLeft: () => follow("prev"),
  ArrowRight: () => follow("next"),
  "/": () => document.getElementById("jump-to")?.select(),
  "?": () => document.getElementById("keys")?.showModal(),
};

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") hide();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && event.target.matches("textarea")) {
    event.preventDefault();
    event.target.form.requestSubmit();
    return;
  }
  if (event.ctrlKey || event.metaKey || event.altKey || isTyping(event.target)) return;
  if (document.querySelector("dialog[open]")) return;
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (step && event.target.matches?.(".strip .t")) {
    event.preventDefault();
    alongStrip(event.target, step);
  } else if (keys[event.key]) {
    event.preventDefault();
    keys[event.key]();
  }
});

// A select, a checkbox and the like take effect at once.
document.addEventListener("change", (event) => {
  const form = event.target.form;
  if (form?.dataset.auto !== undefined && !event.target.matches("textarea, input[type=text]"))
    form.requestSubmit();
});

document.addEventListener("click", (event) => {
  const button = event.target.closest?.("[data-copy]");
  if (button) {
    navigator.clipboard?.writeText(document.getElementById(button.dataset.copy).textContent);
    button.textContent = "Copied";
  }
  // A click into the picture of a pattern chooses its row.
  const picture = event.target.closest?.("img[data-rows]");
  if (picture) {
    const at = picture.getBoundingClientRect();
    const row = Math.floor(((event.clientY - at.top) / at.height) * Number(picture.dataset.rows));
    document.getElementById(`query-${row}`)?.click();
  }
});

// A part that cannot be shown says why, in its place.
document.addEventListener("htmx:response:error", (event) => {
  // A page that shows its problem itself, such as a query's, is swapped as any other.
  if (!event.detail.ctx.text.includes('id="problem"')) return;
  event.detail.ctx.select = "#problem";
  event.detail.ctx.swap = "innerHTML";
  event.detail.ctx.push = "false";
});
document.addEventListener("htmx:error", (event) => {
  const target = event.detail.ctx?.target;
  if (!target) return;
  const note = document.createElement("p");
  note.className = "note bad";
  note.textContent = "The server did not answer. Is it still running? Reload to try again.";
  target.replaceChildren(note);
});
