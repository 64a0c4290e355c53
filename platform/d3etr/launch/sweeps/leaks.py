"""Find and free what dead drivers left reserved: Ray keeps a placement group of a dead job."""

from __future__ import annotations

from ray import PlacementGroupID
from ray.util import remove_placement_group
from ray.util.placement_group import PlacementGroup
from ray.util.state import list_jobs, list_placement_groups

from d3etr.logs import get_logger

logger = get_logger(__name__)

QUERY_SECONDS = 15
MOST_LISTED = 10_000
HELD = ("CREATED", "PENDING", "RESCHEDULING")


def free_leaked_groups() -> list[str]:
    """Remove placement groups whose job is over and that were not meant to outlive it.

    Returns:
        Ids of the removed ones.
    """
    try:
        groups = list_placement_groups(detail=True, limit=MOST_LISTED, timeout=QUERY_SECONDS)
        jobs = list_jobs(limit=MOST_LISTED, timeout=QUERY_SECONDS)
    except Exception as error:  # no dashboard, or one that does not answer
        logger.info("cannot look for reservations of dead drivers: %s", error)
        return []
    over = {job.job_id for job in jobs if job.status in ("SUCCEEDED", "FAILED", "STOPPED")}
    leaked = [
        group.placement_group_id
        for group in groups
        if group.state in HELD and group.creator_job_id in over and not group.is_detached
    ]
    for identity in leaked:
        remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(identity))))
        logger.warning("freed what a dead driver had reserved (placement group %s)", identity)
    return leaked
