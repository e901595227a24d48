"""The part of a JobSet that launch/gke_jobset.yaml uses, as a JSON schema, written down from the sources.

JobSet: config/components/crd/bases/jobset.x-k8s.io_jobsets.yaml of github.com/kubernetes-sigs/jobset at
08dfbdfd (August 2026), which contains Kubernetes' own schema of Jobs and Pods. Values of enumerations that
stand there as text only (completionMode, restartPolicy) are those of the Kubernetes API reference, batch/v1
and core/v1.
Every field that is not written here is refused, so a new one is looked up first.
"""

NAME = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}
PORT_NAME = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 15}
TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
COUNT = {"type": "integer", "minimum": 0}
WORDS = {"type": "array", "items": {"type": "string"}, "minItems": 1}


def an_object(required: str = "", **properties) -> dict:
    """An object with these fields alone; `required` names some of them."""
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


def a_list(of: dict) -> dict:
    return {"type": "array", "items": of, "minItems": 1}


METADATA = an_object("name", name=NAME, annotations=TEXTS, labels=TEXTS)

CONTAINER = an_object(
    "name image",
    name=NAME,
    image={"type": "string", "minLength": 1},
    command=WORDS,
    args=WORDS,
    securityContext=an_object(privileged={"type": "boolean"}, runAsUser=COUNT),
    ports=a_list(
        an_object(
            "containerPort",
            name=PORT_NAME,
            containerPort={"type": "integer", "minimum": 1, "maximum": 65535},
            protocol={"enum": ["TCP", "UDP", "SCTP"]},
        )
    ),
    env=a_list(an_object("name", name={"type": "string"}, value={"type": "string"})),
    resources=an_object(limits={"type": "object"}, requests={"type": "object"}),
    volumeMounts=a_list(
        an_object("name mountPath", name=NAME, mountPath={"type": "string"}, readOnly={"type": "boolean"})
    ),
)

POD = an_object(
    "containers",
    restartPolicy={"enum": ["Never", "OnFailure"]},  # those that a Job may have
    terminationGracePeriodSeconds=COUNT,
    nodeSelector=TEXTS,
    hostNetwork={"type": "boolean"},
    dnsPolicy={"enum": ["ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"]},
    serviceAccountName=NAME,
    volumes=a_list(
        an_object(
            "name",
            name=NAME,
            persistentVolumeClaim=an_object("claimName", claimName=NAME, readOnly={"type": "boolean"}),
        )
    ),
    containers=a_list(CONTAINER),
)

RULE = an_object(
    "action",
    action={"enum": ["FailJob", "FailIndex", "Ignore", "Count"]},
    onExitCodes=an_object(
        "operator values",
        containerName=NAME,
        operator={"enum": ["In", "NotIn"]},
        values={"type": "array", "items": COUNT, "minItems": 1},
    ),
)
JOB_RULE = an_object(
    "action",
    action={"enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]},
    onJobFailureReasons=a_list(
        {
            "enum": "BackoffLimitExceeded DeadlineExceeded FailedIndexes MaxFailedIndexesExceeded "
            "PodFailurePolicy".split()
        }
    ),
)

JOB = an_object(
    "template",
    completionMode={"enum": ["Indexed", "NonIndexed"]},
    completions=COUNT,
    parallelism=COUNT,
    backoffLimit=COUNT,
    podFailurePolicy=an_object("rules", rules=a_list(RULE)),
    template=an_object("spec", metadata=an_object(annotations=TEXTS, labels=TEXTS), spec=POD),
)

JOBSET = an_object(
    "apiVersion kind metadata spec",
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata=METADATA,
    spec=an_object(
        "replicatedJobs",
        network=an_object(
            enableDNSHostnames={"type": "boolean"},
            publishNotReadyAddresses={"type": "boolean"},
            subdomain=NAME,
        ),
        failurePolicy=an_object(maxRestarts=COUNT, rules=a_list(JOB_RULE)),
        ttlSecondsAfterFinished=COUNT,
        replicatedJobs=a_list(
            an_object("name template", name=NAME, replicas=COUNT, template=an_object("spec", spec=JOB))
        ),
    ),
)
