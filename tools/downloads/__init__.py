"""Fetching what a profile needs and the repository does not hold: prompt tables, statistics, weights, training images.

``make data PROFILE=sd14`` runs it. What is fetched is data: a manifest beside this file, named by the profile's key
``downloads``, lists the files; the hub models are those that the profile names. Each file has a SHA-256, stated in the
manifest or noted at its first use; a file that is there is never fetched again, and a part of one never counts.

Modules: ``manifest`` (what to fetch), ``files`` (files with checksums), ``hub`` (models of the Hugging Face hub),
``images`` (training images by the URLs of a prompt table), ``fetch`` (all of it, with a report).
"""

from nemolib.downloads.fetch import Outcome, fetch_data, outcome_table
from nemolib.downloads.files import DownloadError, fetch_file
from nemolib.downloads.hub import fetch_model
from nemolib.downloads.images import fetch_images
from nemolib.downloads.manifest import Manifest, SourceFile, load_manifest

__all__ = [
    "DownloadError",
    "Manifest",
    "Outcome",
    "SourceFile",
    "fetch_data",
    "fetch_file",
    "fetch_images",
    "fetch_model",
    "load_manifest",
    "outcome_table",
]
