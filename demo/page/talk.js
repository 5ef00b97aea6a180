// Buttons of a conversation, and its last line in sight.

element.addEventListener("click", async (event) => {
  const button = event.target.closest("button[data-does]");
  if (!button) return;
  const turn = button.closest("li"), does = button.dataset.does;
  if (does === "copy") {
    const text = turn.querySelector(".bot").innerText;
    if (navigator.clipboard) await navigator.clipboard.writeText(text);
    else getSelection().selectAllChildren(turn.querySelector(".bot")), document.execCommand("copy");
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  } else if (does === "retry") trigger("retry");
  else if (does === "edit") trigger("edit");
  else trigger("like", { index: Number(turn.dataset.number), liked: does });
});
const isBusy = () => props.value?.includes('aria-busy="true"');
watch("value", () => {
  // Words that left the server before it heard of Stop would make the page wait for more.
  if (window.qformerStopped && isBusy()) setTimeout(() => window.qformerStopped && isBusy() && trigger("stop"), 100);
  const box = element.closest("#chat");
  if (box) box.scrollTop = box.scrollHeight;
});
