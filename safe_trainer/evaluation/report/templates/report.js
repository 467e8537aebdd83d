// Blurred text is hidden from screen readers as long as it is blurred. Without this script the boxes still unblur it.
for (const box of document.querySelectorAll(".reveal input")) {
  const texts = box.closest(".flip").querySelectorAll(".text");
  const follow = () => texts.forEach((text) => text.setAttribute("aria-hidden", String(!box.checked)));
  box.addEventListener("change", follow);
  follow();
}
