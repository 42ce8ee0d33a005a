"""What the programs of this directory share: the branch's URL and the API to suspend it with."""

import json
import sys
import urllib.request

URL, API = sys.argv[1:3]


def suspend():
    """Suspends the branch; fails if a session keeps it awake."""
    path = API + "/v1/projects/shop/branches/prod/compute/suspend"
    request = urllib.request.Request(path, b"{}", {"Content-Type": "application/json"}, method="POST")
    urllib.request.urlopen(request).read()


def wakes():
    """How often the branch was woken."""
    with urllib.request.urlopen(API + "/v1/projects/shop/branches/prod/compute") as answer:
        return json.load(answer)["wakes"]
