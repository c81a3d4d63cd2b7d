"""A move of the explorer's slider, from the event to the picture on its way to the browser; and what a refused upload takes."""
import asyncio
import io
import time

from common import report


def slider_to_picture(px: int, channel_base: int, repeats: int = 15) -> list[float]:
    "Milliseconds of single moves: waiting, drawing, encoding."
    import torch
    from dermgan.frames import Latest, Move, encode_picture, picture, random_source
    from dermgan.hyperstyle import Nets
    from dermgan.stylegan2 import Generator
    torch.manual_seed(0)
    nets = Nets(Generator(px, 256, 256, channel_base, 128, 8).eval().requires_grad_(False))
    source, vector, times = random_source(nets, 0), torch.eye(256, dtype=torch.float64)[0], []

    async def measure():
        for k in range(repeats + 1):
            done = asyncio.Event()
            latest = Latest(lambda alpha: (encode_picture(picture(nets, source, [Move("", vector, [0, 1], alpha)])[0]), done.set()))
            begun = time.perf_counter()
            latest(k / 10)
            await done.wait()
            times.append(1000 * (time.perf_counter() - begun))

    asyncio.run(measure())
    return times[1:]


def refusal() -> float:
    "Seconds that the slowest of the large uploads takes to be refused."
    import torch
    from PIL import Image
    from dermgan.core import DataRefused
    from dermgan.frames import upload_source
    from dermgan.hyperstyle import Nets
    from dermgan.stylegan2 import Generator
    nets, slowest = Nets(Generator(32, 16, 24, 256, 16, 2).eval().requires_grad_(False)), 0.0
    for size in ((16000, 16000), (10000, 9600)):
        Image.new("1", size).save(buffer := io.BytesIO(), "PNG")
        for data in (buffer.getvalue(), bytes(12 * 2**20)):
            begun = time.perf_counter()
            try:
                upload_source(None, nets, data, "x.png")
            except DataRefused:
                slowest = max(slowest, time.perf_counter() - begun)
    return slowest


def main():
    "Milliseconds of a move at two sizes; seconds of a refusal."
    report("explore_move_64", slider_to_picture(64, 4096), "ms, event to JPEG", 150)
    report("explore_move_128", slider_to_picture(128, 4096), "ms, event to JPEG", 150)
    report("explore_refusal", refusal(), "s, slowest refused upload", 1)


if __name__ == "__main__":
    main()
