// Zoom and pan of the maps, which are complete without it. Neither "less than" nor an
// ampersand is in here, so that the page stays XML.
for (const figure of document.querySelectorAll('figure.map')) {
  const svg = figure.querySelector('svg');
  const length = figure.querySelector('.length');
  const picked = figure.querySelector('.picked');
  const { width, height } = svg.viewBox.baseVal;
  const full = [width, height];
  let zoom = 1;
  let corner = [0, 0];
  let held = null;

  const within = (value, low, high) => Math.min(Math.max(value, low), high);
  const show = () => {
    corner = corner.map((value, i) => within(value, 0, full[i] - full[i] / zoom));
    svg.setAttribute('viewBox', [...corner, width / zoom, height / zoom].join(' '));
    svg.style.setProperty('--shrink', 1 / zoom);
    // At first a finger scrolls the page; there is nothing to move yet.
    svg.style.touchAction = zoom > 1 ? 'none' : 'pan-y';
    const metres = length.dataset.metres / zoom;
    const short = (value) => Number(value.toPrecision(3));
    length.textContent = metres >= 1000 ? `${short(metres / 1000)} km` : `${short(metres)} m`;
  };
  // What lies at a share of the view stays there.
  const scale = (factor, at = [0.5, 0.5]) => {
    const next = within(zoom * factor, 1, 1024);
    corner = corner.map((value, i) => value + at[i] * full[i] * (1 / zoom - 1 / next));
    zoom = next;
    show();
  };
  const move = (...shares) => {
    corner = corner.map((value, i) => value + (shares[i] * full[i]) / zoom);
    show();
  };
  const actions = {
    in: () => scale(2),
    out: () => scale(0.5),
    left: () => move(-0.25, 0),
    right: () => move(0.25, 0),
    up: () => move(0, -0.25),
    down: () => move(0, 0.25),
    all: () => scale(0),
  };
  for (const button of figure.querySelectorAll('button')) {
    button.addEventListener('click', actions[button.value]);
  }
  const share = (event) => {
    const box = svg.getBoundingClientRect();
    return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  };
  svg.addEventListener('wheel', (event) => {
    if (!event.ctrlKey) return;
    event.preventDefault();
    scale(event.deltaY > 0 ? 0.5 : 2, share(event));
  }, { passive: false });
  svg.addEventListener('dblclick', (event) => scale(2, share(event)));
  svg.addEventListener('pointerdown', (event) => {
    held = share(event);
  });
  svg.addEventListener('pointermove', (event) => {
    if (held === null || event.buttons === 0) return;
    const now = share(event);
    move(held[0] - now[0], held[1] - now[1]);
    held = now;
  });
  for (const end of ['pointerup', 'pointercancel', 'pointerleave']) {
    svg.addEventListener(end, () => { held = null; });
  }
  // A finger has no tooltip.
  svg.addEventListener('click', (event) => {
    const own = event.target.querySelector(':scope > title');
    const title = own ?? event.target.parentNode.querySelector(':scope > title');
    picked.textContent = title === null ? '' : title.textContent;
  });
  figure.querySelector('.tools').hidden = false;
  show();
}
