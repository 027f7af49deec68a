// What scrolls can be scrolled by the keyboard, too.
function reachable() {
  const kinds = ".md-typeset__scrollwrap, .md-typeset__table, .md-typeset pre > code";
  for (const wide of document.querySelectorAll(kinds)) {
    const scrolls = wide.scrollWidth > wide.clientWidth + 1;
    if (scrolls) wide.setAttribute("tabindex", "0");
    else wide.removeAttribute("tabindex");
  }
}
// The theme's search is a dialog without a name.
function named() {
  document.querySelector(".md-search")?.setAttribute("aria-label", "Search");
}
window.addEventListener("load", reachable);
window.addEventListener("load", named);
window.addEventListener("resize", reachable);
