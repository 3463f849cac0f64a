"""Teacher compute: where did the GPU go, what did it cost, what was saved, and when will a budget be gone?"""

from frame import board
from grafana_foundation_sdk.models import dashboard as models
from panels import RUN, SHARE_LEFT, bars, figure, in_money, lines, override, rows
from queries import BUDGET, of, rate, share, total

RUNS = "tenant, job"
BUDGETS = "tenant, job, unit, period"
LEFT = of("tenant_job_unit_period:preceptor_budget_left:min", BUDGET)
LEFT_SHARE = of("tenant_job_unit_period:preceptor_budget_left_per_limit:min", BUDGET)
FULL = f"({total('preceptor_samples_total')} + {total('preceptor_unasked_samples_total')})"
HITS = 'source=~"cached|coalesced"'
OF_RUN = 'tenant=~"$tenant", job=~"$job", '


def budget(value: str) -> str:
    """For a table, whose columns Grafana joins where all labels agree: no name, and always a job."""
    return f'label_replace(min by ({BUDGETS}) ({value}), "job", "(all)", "job", "")'


def saved(by: str) -> str:
    """Which part of full KD's samples was not computed, since it was cached or coalesced, or not asked about."""
    full = f"{total('preceptor_samples_total', by)} + {total('preceptor_unasked_samples_total', by)}"
    computed = total("preceptor_samples_total", by, OF_RUN + 'source="computed"')
    return f"1 - {share(computed, full)}"


def built() -> models.Dashboard:
    first = [
        figure(
            "Device time",
            total("preceptor_device_seconds_total"),
            "s",
            "Of the samples that were charged, over the range. What nobody paid for is at the bottom.",
        ),
        figure(
            "Samples computed", total("preceptor_charged_samples_total"), "short", "Forwarded, and charged to a job."
        ),
        figure("Computation", total("preceptor_flops_total"), "si:FLOP", "Teacher FLOPs of the charged samples."),
        in_money(
            figure(
                "Money",
                {"{{currency}}": total("preceptor_cost_total", "currency")},
                "short",
                "Charged over the range. Currencies are not added. A teacher without a price shows 0.",
                decimals=2,
            )
        ),
        figure(
            "Saved against full KD",
            saved(""),
            "percentunit",
            "Of the samples that students saw, those that the teacher did not have to compute: cached, coalesced, or "
            "never asked about. Students say from how many they chose; one that does not counts as asking about all.",
            steps=((None, "text"), (0.25, "green")),
            empty="nothing asked",
        ),
        figure(
            "Least budget left",
            f"min({LEFT_SHARE})",
            "percentunit",
            "Of any budget of the tenants and jobs chosen; the table below has all of them.",
            steps=SHARE_LEFT,
            empty="no budget",
        ),
    ]
    went = [
        lines(
            "Where the device's time went",
            {RUN: rate("preceptor_device_seconds_total", RUNS)},
            "short",
            "1 is one device that computes all the time for that job. Several replicas add up.",
            stacked=True,
            width=16,
            height=10,
            axis="devices",
        ),
        bars(
            "Who spends most",
            {RUN: f"topk(10, {total('preceptor_device_seconds_total', RUNS)})"},
            "s",
            "Device time over the range, the ten largest.",
            height=10,
        ),
    ]
    table = rows(
        "By tenant and job",
        {
            "device time": (total("preceptor_device_seconds_total", RUNS), "s"),
            "asked": (total("preceptor_asked_samples_total", RUNS), "locale"),
            "charged": (total("preceptor_charged_samples_total", RUNS), "locale"),
            "cached": (total("preceptor_samples_total", RUNS, OF_RUN + 'source="cached"'), "locale"),
            "coalesced": (total("preceptor_samples_total", RUNS, OF_RUN + 'source="coalesced"'), "locale"),
            "not asked about": (total("preceptor_unasked_samples_total", RUNS), "locale"),
            "saved": (saved(RUNS), "percentunit"),
            "FLOPs": (total("preceptor_flops_total", RUNS), "si:FLOP"),
            "money": (total("preceptor_cost_total", f"{RUNS}, currency"), "short"),
        },
        "Over the range, to the sample; of a replica that restarted in it, estimated by Prometheus. A job's name leads "
        "to its student.",
        labels=("tenant", "job"),
        order_by="device time",
        left_out="asked",
    )
    chosen = "&".join(f"var-{label}=${{__data.fields.{label}:percentencode}}" for label in ("tenant", "job"))
    student = f"/d/preceptor-students?{chosen}&${{__url_time_range}}"
    override(table, "job", links=[{"title": "Its student", "url": student, "targetBlank": False}])
    override(table, "money", decimals=2)
    answers = [
        lines(
            "Samples of full KD, and what became of them",
            {
                "computed": rate("preceptor_samples_total", labels=OF_RUN + 'source="computed"'),
                "cached": rate("preceptor_samples_total", labels=OF_RUN + 'source="cached"'),
                "coalesced": rate("preceptor_samples_total", labels=OF_RUN + 'source="coalesced"'),
                "not asked about": rate("preceptor_unasked_samples_total"),
            },
            "short",
            "Every sample that students saw. Only those computed cost device time.",
            stacked=True,
            axis="samples / s",
        ),
        lines(
            "Saved, by selection and by the cache",
            {
                "by selection": share(
                    rate("preceptor_unasked_samples_total"),
                    f"{rate('preceptor_samples_total')} + {rate('preceptor_unasked_samples_total')}",
                ),
                "by the cache": share(
                    rate("preceptor_samples_total", labels=OF_RUN + HITS),
                    f"{rate('preceptor_samples_total')} + {rate('preceptor_unasked_samples_total')}",
                ),
            },
            "percentunit",
            stacked=True,
            top=1,
        ),
    ]
    falling = f"(deriv({LEFT}[1h]) < 0)"
    budgets = rows(
        "Budgets",
        {
            "left": (budget(LEFT), "locale"),
            "limit": (budget(of("preceptor_budget_limit", BUDGET)), "locale"),
            "part left": (budget(LEFT_SHARE), "percentunit"),
            "gone in": (budget(f"{LEFT} / -{falling}"), "s"),
        },
        "Samples, or money in the currency of the price. Gone in: what is left at the rate of the last hour, unless "
        "the budget's day or month ends first; empty where nothing is spent. (all): the tenant's own.",
        labels=("tenant", "job", "unit", "period"),
        order_by="part left",
        rising=True,
        width=12,
    )
    override(
        budgets,
        "part left",
        min=0,
        max=1,
        custom__cellOptions={"type": "gauge", "mode": "basic"},
        thresholds={"mode": "absolute", "steps": [{"value": start, "color": colour} for start, colour in SHARE_LEFT]},
        color={"mode": "thresholds"},
    )
    burning = lines(
        "Budgets burning down",
        {"{{tenant}} {{job}} ({{unit}}, {{period}})": LEFT_SHARE},
        "percentunit",
        "The lowest that any replica heard of is the latest. Below a tenth PreceptorBudgetNearlySpent fires.",
        height=9,
        top=1,
        steps=((None, "transparent"), (0.1, "red")),
    )
    charged = share(
        rate("preceptor_device_seconds_total", labels=""), rate("preceptor_device_busy_seconds_total", labels="")
    )
    device = [
        lines(
            "Device busy, by replica",
            {"{{instance}}": rate("preceptor_device_busy_seconds_total", "instance", "")},
            "percentunit",
            "Which part of its time each replica's device computes, whoever paid.",
            width=8,
            top=1,
        ),
        lines(
            "Of the device's work, charged to nobody",
            {"not charged": f"clamp_min(1 - {charged}, 0)"},
            "percentunit",
            "All tenants. Warm-up and self-tests of a replica that starts, queries given up, passes that failed.",
            width=8,
            top=1,
        ),
        bars(
            "Samples charged to nobody",
            {"{{account}}: {{reason}}": total("preceptor_platform_samples_total", "account, reason", "")},
            "locale",
            "All tenants, over the range. own: the platform's; wasted: who asked was gone, or the pass failed.",
        ),
    ]
    return board(
        "preceptor-compute",
        "Where the teacher's compute went, by tenant and job: device time, samples, money, what was saved, budgets.",
        "24h",
        "1m",
        {
            "": first,
            "Where did the GPU go?": [*went, table],
            "What was saved": answers,
            "Budgets": [budgets, burning],
            "The device": device,
        },
    )
