// Wide tables scroll in a box of the theme; a keyboard must reach it.
document$.subscribe(() => {
  for (const box of document.querySelectorAll(".md-typeset__scrollwrap")) box.tabIndex = 0;
});
