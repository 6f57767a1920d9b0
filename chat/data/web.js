// What a reader folded or opened stays so while the answer streams in, and the page follows the answer's end
// unless its reader has scrolled away from it.
const chosen = new Map();
element.addEventListener("click", (event) => {
  const summary = event.target.closest("summary");
  if (summary) chosen.set(summary.parentElement.dataset.key, !summary.parentElement.open);
});
const page = document.documentElement;
let atEnd = true;
window.addEventListener("scroll", () => {
  atEnd = page.scrollHeight - window.innerHeight - window.scrollY < 160;
}, { passive: true });
watch("value", () => {
  if (!element.textContent.trim()) chosen.clear();
  for (const details of element.querySelectorAll("details[data-key]")) {
    if (chosen.has(details.dataset.key)) details.open = chosen.get(details.dataset.key);
  }
  if (atEnd) window.scrollTo({ top: page.scrollHeight });
});
