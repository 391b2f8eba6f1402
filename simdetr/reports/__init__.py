"""Pages and pictures: what people look at.

In reading order:

    drawing             images, boxes, points and score maps -> pictures; montages
    charts              numbers -> inline SVG
    score_text          a score -> text
    page                data -> one HTML file that needs nothing else
    report              a run's folder -> what its report shows
    prediction_samples  what a trained head found on validation images
    preview_page        the page of a mining preview
    rival_recall        ours beside other methods
    comparison_page     a comparison of arms -> its answer and page
"""

from typing import TYPE_CHECKING

from simdetr.data.first_use import names_on_first_use

if TYPE_CHECKING:
    from simdetr.reports.charts import draw_flow
    from simdetr.reports.drawing import (
        class_colour,
        class_montage,
        contact_sheet,
        draw_boxes,
        draw_heat_map,
        draw_points,
        write_pictures,
    )
    from simdetr.reports.page import ReportData, write_report
    from simdetr.reports.report import collect_run
else:
    __getattr__, __dir__ = names_on_first_use(
        __name__,
        {
            "charts": ("draw_flow",),
            "drawing": (
                "class_colour",
                "class_montage",
                "contact_sheet",
                "draw_boxes",
                "draw_heat_map",
                "draw_points",
                "write_pictures",
            ),
            "page": ("ReportData", "write_report"),
            "report": ("collect_run",),
        },
    )

__all__ = [
    "ReportData",
    "class_colour",
    "class_montage",
    "collect_run",
    "contact_sheet",
    "draw_boxes",
    "draw_flow",
    "draw_heat_map",
    "draw_points",
    "write_pictures",
    "write_report",
]
