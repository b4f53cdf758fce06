// Names and keyboard access for what the theme makes without them.
const mend = () => {
  for (const table of document.querySelectorAll(".md-typeset__scrollwrap")) table.tabIndex = 0;
  document.querySelectorAll(".md-code__nav").forEach((buttons, i) => { buttons.ariaLabel = `Code ${i + 1}`; });
};
document.querySelector(".md-search").ariaLabel = "Search";
new MutationObserver(mend).observe(document.body, { childList: true, subtree: true });
