// What a reader folded or opened stays so while the answer streams in, and the page follows the answer's end
// unless its reader has scrolled away from it.
const chosen = new Map();
element.addEventListener("click", (event) => {
  const summary = event.target.closest("summary");
  if (summary) chosen.set(summary.parentElement.dataset.key, !summary.parentElement.open);
});
const belowView = () => document.querySelector("#talk").getBoundingClientRect().bottom - window.innerHeight;
let follows = true;
window.addEventListener("scroll", () => { follows = belowView() < 160; }, { passive: true });
watch("value", () => {
  if (!element.textContent.trim()) chosen.clear();
  for (const details of element.querySelectorAll("details[data-key]")) {
    if (chosen.has(details.dataset.key)) details.open = chosen.get(details.dataset.key);
  }
  if (follows && belowView() > 0) window.scrollBy({ top: belowView(), behavior: "instant" });
});
