"""Every fault of the mini-web in one table: its name, how it is planted, the right fate, and how often.

A fate is `keep`, `keep_one_of_group` (of the rows with one `group` exactly one is kept) or a stage and a reason;
`a|b` where either is right. `rows` is the number planted in a list of 3,000 rows, `least` the smallest number with
which the fault is one. Rows without a fault are called `none`. There is no fault for adult pictures: no such
material is made, so the safety signal is measured elsewhere.
"""

from dataclasses import dataclass

BASE_ROWS = 3000
CLEAN = "none"
GROUP = "keep_one_of_group"


@dataclass(frozen=True)
class Fault:
    name: str
    planted: str
    expected: str
    rows: int
    least: int = 1


FAULTS: tuple[Fault, ...] = (
    # dead and dying links
    Fault("http_404", "the page is gone, with an HTML body", "fetch:http_404", 30),
    Fault("http_410", "gone for good", "fetch:http_410", 8),
    Fault("http_403", "forbidden", "fetch:http_403", 12),
    Fault("http_500", "500 at every request", "fetch:http_500", 3),
    Fault("always_429", "429 with Retry-After: 1 at every request", "fetch:http_429", 3),
    Fault("always_503", "503 with Retry-After: 1 at every request", "fetch:http_503", 3),
    Fault("unknown_host", "a host name that does not resolve", "fetch:dns", 6),
    Fault("refused", "a host whose port refuses connections", "fetch:connect", 6),
    Fault("reset", "the connection is reset instead of an answer", "fetch:reset", 5),
    Fault("drip", "a byte every 0.2 s for ever", "fetch:timeout", 4),
    Fault("slow_headers", "a header line every 0.2 s for ever", "fetch:timeout", 2),
    Fault("endless", "a chunked body without end, as fast as it is read", "fetch:too_large", 2),
    Fault("huge_length", "Content-Length of 100 GB", "fetch:too_large", 3),
    Fault("gzip_bomb", "1 MB of gzip that unpacks to 1 GB", "fetch:too_large", 4),
    Fault("cut", "fewer bytes than Content-Length says", "fetch:truncated", 8),
    Fault("cut_chunked", "a chunked body without its last chunk", "fetch:truncated", 4),
    Fault("empty_body", "200 with no bytes", "image:empty", 6),
    # redirects
    Fault("redirect", "one to three redirects by 301, 302, 303, 307, 308, some to another host", "keep", 20),
    Fault("redirect_loop", "two pages that redirect to each other", "fetch:redirect_loop", 5),
    Fault("redirect_chain", "25 redirects in a row", "fetch:redirect_loop", 3),
    Fault("redirect_file", "redirect to file:///etc/passwd and other schemes", "fetch:redirect_scheme", 4),
    Fault("redirect_private", "redirect to a loopback, private or metadata address", "fetch:blocked_address", 8),
    # travels oddly, arrives well
    Fault("chunked", "chunked transfer encoding", "keep", 5),
    Fault("gzip_picture", "Content-Encoding: gzip, asked for or not", "keep", 4),
    Fault(
        "then_good_429",
        "one or two 429 with Retry-After in seconds or as a date, then the picture",
        "keep",
        8,
    ),
    Fault("then_good_503", "503 with Retry-After: 1, then the picture", "keep", 6),
    Fault("then_good_500", "500 once, then the picture", "keep", 6),
    Fault("limited_host", "a host that answers 429 to more than 6 requests a second", "keep", 12),
    Fault("slow_host", "a host that answers after 0.15 s", "keep", 12),
    Fault("wrong_type", "a picture sent as text/html, text/plain or octet-stream", "keep", 6),
    Fault("wrong_extension", "a picture whose name ends in .php, .png (a JPEG) or nothing", "keep", 6),
    Fault("odd_url", "commas, spaces, non-ASCII, quotes, IDN host, port, fragment, case, very long", "keep", 24),
    # wishes
    Fault("robots_all", "robots.txt disallows everybody", "fetch:robots", 8),
    Fault("robots_agent", "robots.txt disallows this crawler by name", "fetch:robots", 6),
    Fault("robots_path", "robots.txt disallows the folder, or *.webp$", "fetch:robots", 8),
    Fault("robots_5xx", "robots.txt answers 500", "fetch:robots", 4),
    Fault("robots_allowed", "a longer Allow inside a disallowed folder", "keep", 8),
    Fault("robots_missing", "robots.txt answers 404", "keep", 6),
    Fault("robots_others", "robots.txt disallows other crawlers by name", "keep", 6),
    Fault("opt_out_header", "X-Robots-Tag against training or indexing, 14 spellings", "fetch:opt_out", 42),
    Fault("opt_out_usage", "Content-Usage: train-ai=n", "fetch:opt_out", 3),
    Fault("opt_out_tdm", "tdm-reservation: 1", "fetch:opt_out", 4),
    Fault("opt_out_tdm_file", "the path is reserved by /.well-known/tdmrep.json", "fetch:opt_out", 4),
    Fault("not_opt_out", "X-Robots-Tag for other agents or about other things, tdm-reservation: 0", "keep", 24),
    Fault("open_tdm_file", "a path that the host's tdmrep.json leaves free", "keep", 4),
    # no picture
    Fault("html", "an HTML page named .jpg, also as image/jpeg", "image:not_an_image", 12),
    Fault("soft_404", "200 with a page that says: not found", "image:not_an_image", 8),
    Fault("svg", "an SVG drawing", "image:not_an_image", 6),
    Fault("cut_jpeg", "a JPEG file that ends half-way", "image:corrupt", 10),
    Fault("cut_png", "a PNG file that ends half-way", "image:corrupt", 6),
    Fault(
        "corrupt_jpeg",
        "random bytes and markers in the middle of the scan, or broken tables",
        "image:corrupt",
        8,
    ),
    Fault("corrupt_png", "random bytes in the middle", "image:corrupt", 6),
    Fault("claimed_bomb", "a small PNG that claims 60,000 x 60,000 pixels", "image:too_many_pixels", 4),
    Fault("real_bomb", "a valid PNG of 0.1 MB with 900 million pixels", "image:too_many_pixels", 2),
    # pictures of every kind
    Fault("progressive", "progressive JPEG", "keep", 6),
    Fault("cmyk", "CMYK JPEG", "keep", 6),
    Fault("grey_jpeg", "greyscale JPEG of a scene in black, white and grey", "keep", 5),
    Fault("png", "PNG", "keep", 10),
    Fault("png_16bit", "PNG with 16 bits a channel", "keep", 6),
    Fault("grey_16bit", "16-bit greyscale PNG of a scene in black, white and grey", "keep", 3),
    Fault("palette", "PNG with a palette", "keep", 6),
    Fault("transparent", "PNG with a see-through frame over noise", "keep", 8),
    Fault("animated_png", "APNG; the first frame fits the caption", "keep", 4),
    Fault("gif", "GIF", "keep", 8),
    Fault("animated_gif", "animated GIF; the first frame fits the caption", "keep", 6),
    Fault("webp", "WebP", "keep", 10),
    Fault("animated_webp", "animated WebP; the first frame fits the caption", "keep", 4),
    Fault("bmp", "BMP", "keep", 5),
    Fault("tiff", "TIFF", "keep", 5),
    Fault("exif_rotated", "JPEG stored under EXIF orientation 2 to 8", "keep", 21),
    Fault("large_picture", "1,600 pixels a side", "keep", 3),
    # pictures not worth keeping
    Fault("tiny", "8 to 24 pixels a side", "filter:min_side", 12),
    Fault("tracking_pixel", "a white GIF of one pixel", "filter:min_side", 4),
    Fault("banner", "900 x 150 pixels", "filter:max_aspect", 8),
    Fault("sliver", "2,000 x 8 pixels", "image:aspect", 6),
    Fault("near_blank", "one shade with a noise of one step", "filter:near_blank", 10),
    # captions
    Fault("wrong_caption", "the caption of another scene, on a held-out scene", "filter:min_clip", 130),
    Fault(
        "spam_caption",
        "advertising, with prices, links and shouting",
        "filter:spam_caption|filter:min_clip",
        25,
    ),
    Fault("filename_caption", "a file name", "filter:filename_caption|filter:min_words", 24),
    Fault("foreign_caption", "a sentence in one of 12 other languages", "filter:min_p_en", 48),
    Fault("null_caption", "no caption", "filter:no_caption", 10),
    Fault("empty_caption", "an empty caption, or only spaces", "filter:no_caption", 6),
    Fault("one_word", "one word", "filter:min_words", 12),
    Fault("repeated_caption", "one template on 30 pictures", "filter:max_caption_repeats", 60, least=24),
    Fault("long_caption", "500 words and more, one of 1 MB", "filter:max_words", 4),
    # URLs
    Fault("no_url", "no URL, or an empty one", "urls:no_url|urls:invalid_url", 4),
    Fault("invalid_url", "no host, a bad port, a bad IPv6 literal, a relative path, …", "urls:invalid_url", 14),
    Fault("scheme", "file, ftp, data, javascript, s3, gopher", "urls:scheme", 12),
    Fault("private_address", "loopback, private, metadata, in every spelling", "fetch:blocked_address", 22),
    # near-duplicates: groups of one original and two copies on average
    Fault("dup_original", "a picture that has copies elsewhere", GROUP, 70, least=2),
    Fault("dup_exact", "the same bytes under another URL", GROUP, 20),
    Fault("dup_same_url", "the same URL with another caption", GROUP, 10),
    Fault("dup_reencoded", "JPEG quality 30 to 90, or WebP", GROUP, 30),
    Fault("dup_resized", "60 % to 150 % of the side", GROUP, 25),
    Fault("dup_cropped", "2 % to 6 % of the side cut away", GROUP, 30),
    Fault("dup_recoloured", "brightness, saturation or tint, mildly", GROUP, 25),
    # planted last: a copy of a clean row, later in the list
    Fault("repeated_row", "URL and caption of an earlier row", "urls:repeated", 25),
)

BY_NAME = {fault.name: fault for fault in FAULTS}


def counts(rows: int) -> dict[str, int]:
    """How many rows of each fault a list of `rows` rows has, in the table's order."""
    return {fault.name: max(fault.least, round(fault.rows * rows / BASE_ROWS)) for fault in FAULTS}
