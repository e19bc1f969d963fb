(() => {
  const box = document.getElementById("search-words");
  const counter = document.getElementById("search-count");
  const rows = [...document.querySelectorAll("#search tbody tr")];
  const texts = rows.map((row) => row.textContent.toLowerCase());
  const show = () => {
    const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    rows.forEach((row, number) => {
      row.hidden = !words.every((word) => texts[number].includes(word));
      shown += row.hidden ? 0 : 1;
    });
    counter.textContent = `${shown.toLocaleString("en")} of ${rows.length.toLocaleString("en")}`;
  };
  box.parentElement.hidden = false;
  box.addEventListener("input", show);
  show();
})();
