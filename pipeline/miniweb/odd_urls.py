"""URLs as lists really have them: odd ones that work, invalid ones, other schemes, and private addresses."""

from pipeline.miniweb.hosts import DOMAIN, FOREIGN_NAME

# (as written in the list, as a server sees it after decoding); {} is a number
_WORKING = (
    ("http://shop1.{d}/odd/red,blue,green-{n}.jpg", ""),
    ("http://shop2.{d}/odd/with space-{n}.jpg", ""),
    ("http://blog1.{d}/odd/café-au-lait-{n}.jpg", ""),
    ("http://blog2.{d}/odd/картинка-{n}.jpg", ""),
    ("http://wiki1.{d}/odd/写真-{n}.jpg", ""),
    ("http://{idn}/odd/straße-{n}.jpg", ""),
    ("http://shop3.{d}/odd/caf%C3%A9%20{n}.jpg", ""),
    ("http://cdn1.{d}/odd/img?id={n}&size=large,small", ""),
    ("http://cdn2.{d}/odd/img.php?file=a+b%2Bc-{n}.jpg", ""),
    ("http://news1.{d}/odd/{n}.jpg#top", ""),
    ("HTTP://News2.MiniWeb.Test/odd/Upper-{n}.JPG", ""),
    ("http://photos1.{d}:80/odd/{n}.jpg", ""),
    ("  http://photos2.{d}/odd/{n}.jpg ", ""),
    ("http://photos3.{d}/odd//double//{n}.jpg", ""),
    ("http://photos4.{d}/odd/it's-(final)-[{n}].jpg", ""),
    ('http://photos5.{d}/odd/"quoted"-{n}.jpg', ""),
    ("http://photos6.{d}/odd/a|b;c={n}.jpg", ""),
    ("http://photos7.{d}/odd/😀-{n}.jpg", ""),
    ("http://photos8.{d}/odd/./here/../{n}.jpg", "http://photos8.{d}/odd/{n}.jpg"),
    ("http://shop4.{d}/odd/{long}-{n}.jpg", ""),
    ("http://shop5.{d}/odd/100%25-wool-{n}.jpg", ""),
    ("http://shop6.{d}/odd/tilde~and$-{n}.jpg", ""),
    ("http://wiki2.{d}?picture={n}", ""),
    ("http://reader:secret@shop7.{d}/odd/{n}.jpg", "http://shop7.{d}/odd/{n}.jpg"),
)

INVALID = (
    "http://",
    "not a url at all",
    "photo.jpg",
    "/images/photo.jpg",
    "//cdn.example/photo.jpg",
    "www.example.org/photo.jpg",
    "http://exa mple.test/photo.jpg",
    "http://shop1.miniweb.test:99999/photo.jpg",
    "http://shop1.miniweb.test:port/photo.jpg",
    "http://[::nope]/photo.jpg",
    "http://[1:2:3/photo.jpg",
    "http://%zz.test/photo.jpg",
    "http://a<b>.test/photo.jpg",
    "://shop1.miniweb.test/photo.jpg",
)

OTHER_SCHEMES = (
    "file:///etc/passwd",
    "file://localhost/etc/hostname",
    "ftp://ftp.miniweb.test/pub/photo.jpg",
    "data:image/png;base64,iVBORw0KGgo=",
    "javascript:alert(1)",
    "s3://bucket/photo.jpg",
    "gopher://miniweb.test/1/photo",
    "about:blank",
    "blob:http://shop1.miniweb.test/0b9f3e",
    "ws://shop1.miniweb.test/photo.jpg",
    "mailto:photo@miniweb.test",
    "FILE:///etc/shadow",
)

PRIVATE = (
    "http://127.0.0.1/photo.jpg",
    "http://127.0.0.1:22/photo.jpg",
    "http://10.1.2.3/photo.jpg",
    "http://172.16.0.9/photo.jpg",
    "http://192.168.0.1/photo.jpg",
    "http://169.254.169.254/latest/meta-data/iam/",
    "http://100.64.0.1/photo.jpg",
    "http://0.0.0.0/photo.jpg",
    "http://[::1]/photo.jpg",
    "http://[::ffff:127.0.0.1]/photo.jpg",
    "http://[fe80::1]/photo.jpg",
    "http://[fd00::1]/photo.jpg",
    "http://[64:ff9b::7f00:1]/photo.jpg",
    "http://[2002:7f00:1::]/photo.jpg",
    "http://2130706433/photo.jpg",
    "http://0x7f000001/photo.jpg",
    "http://0177.0.0.1/photo.jpg",
    "http://127.1/photo.jpg",
    "http://localhost/photo.jpg",
    "http://user:pass@127.0.0.1/photo.jpg",
    "http://shop1.miniweb.test@127.0.0.1/photo.jpg",
    "http://①②⑦.⓪.⓪.①/photo.jpg",
)


def working(k: int, seed: int) -> tuple[str, str]:
    """The `k`-th odd URL that works: as written in the list, and as it is asked for."""
    written, requested = _WORKING[k % len(_WORKING)]
    names = {"d": DOMAIN, "idn": FOREIGN_NAME, "n": f"{seed:x}{k:04d}", "long": "very-" * 360 + "long"}
    return written.format(**names), (requested or written).format(**names)
