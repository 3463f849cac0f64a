"""What can go wrong for a student.

TeacherError
├── InvalidQuery            the samples contradict what the teacher describes, or the server refused them
├── TeacherMisunderstands   the teacher's answers do not fit the labels: normalisation, class order, layout
├── FingerprintChanged      another teacher answers now than the one this run began with
├── UnknownTeacher          no teacher of that name is served there
├── NotAllowed              no token, a wrong one, or not enough rights
├── NotTrusted              TLS: the server's certificate is not accepted, or ours is not, or one side speaks none
├── BudgetSpent             stop: the budget is used up, or what is left of it is less than the query needs
├── NotServed               the server does not know this call, field or value
├── TeacherFailed           the teacher's own forward pass failed
└── TeacherUnavailable      no server answered in time, or all refused to take more; retries are used up

ClusterError                a Ray cluster is not there, lets us not in, knows no such job, or lost it
"""


class TeacherError(Exception):
    """Base of all that a TeacherClient raises."""


class InvalidQuery(TeacherError, ValueError):
    pass


class TeacherMisunderstands(TeacherError):
    pass


class FingerprintChanged(TeacherError):
    pass


class UnknownTeacher(TeacherError):
    pass


class NotAllowed(TeacherError):
    pass


class NotTrusted(TeacherError):
    pass


class BudgetSpent(TeacherError):
    pass


class NotServed(TeacherError):
    pass


class TeacherFailed(TeacherError):
    pass


class TeacherUnavailable(TeacherError):
    pass


class ClusterError(Exception):
    pass
