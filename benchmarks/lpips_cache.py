"""LPIPS of one original against five transformed images: kept features (6 trunk passes) against pairs (10)."""
import statistics

from common import report, turns


def main():
    "CPU seconds of both ways; the ratio has to be near 6/10."
    import torch
    from dermgan.metrics import open_lpips
    lpips, draw = open_lpips(None), torch.Generator().manual_seed(0)
    original, five = (torch.rand(n, 3, 64, 64, generator=draw) * 2 - 1 for n in (16, 80))
    with torch.inference_mode():
        def pairs():
            return lpips(original.repeat_interleave(5, 0), five)

        def kept():
            return lpips.distance([f.repeat_interleave(5, 0) for f in lpips.features(original)], lpips.features(five))

        assert torch.allclose(pairs(), kept(), atol=1e-6)
        took = turns({"pairs": pairs, "kept": kept}, 25, scale=1000 / 80)
    middle = {f"{name}_ms_an_image": round(statistics.median(times), 3) for name, times in took.items()}
    report("lpips_cache", [fast / slow for fast, slow in zip(took["kept"], took["pairs"])], "of the time of pairs", 0.75, **middle)


if __name__ == "__main__":
    main()
