{{/* What all four services' pods have in common. */}}

{{/* Ids that are not root's and own nothing on a node. */}}
{{- define "cacheclip.podSecurity" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
# A volume that already belongs to the group is not walked through again at every start.
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "cacheclip.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities:
  drop: [ALL]
{{- end -}}

{{/* Where a pod may stand, of dict "root" "component" "values". */}}
{{- define "cacheclip.placement" -}}
{{- with .values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
topologySpreadConstraints:
{{- if .values.topologySpreadConstraints }}
  {{- toYaml .values.topologySpreadConstraints | nindent 2 }}
{{- else }}
  # One node lost should not take all replicas; a cluster of one node must still run them.
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "cacheclip.selector" . | nindent 8 }}
{{- end }}
{{- end -}}

{{/* Labels and annotations of a pod, of dict "root" "component" "values" "config" (the file's text). */}}
{{- define "cacheclip.podMetadata" -}}
labels:
  {{- include "cacheclip.podLabels" . | nindent 2 }}
  {{- with .values.podLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
annotations:
  # A service reads its configuration once: another text is another pod.
  checksum/config: {{ .config | sha256sum }}
  {{- with .checksums }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
  {{- with .values.podAnnotations }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}

{{/*
Probes, of dict "port" "values". Liveness asks the process alone, never what it depends on: restarting a service because
another is away makes one outage two. Readiness is the health of the empty name; it also flips while the service drains.
The port of a service with a model opens after loading, so the start has its own budget.
*/}}
{{- define "cacheclip.probes" -}}
startupProbe:
  grpc:
    port: {{ .port }}
    service: liveness
  periodSeconds: 5
  timeoutSeconds: 2
  failureThreshold: {{ divf .values.startupSeconds 5 | ceil | int }}
livenessProbe:
  grpc:
    port: {{ .port }}
    service: liveness
  periodSeconds: 10
  timeoutSeconds: 5
  # Half a minute without an answer: a busy node is no reason for a restart.
  failureThreshold: 3
readinessProbe:
  grpc:
    port: {{ .port }}
    service: ""
  periodSeconds: 5
  timeoutSeconds: 2
  failureThreshold: 2
{{- end -}}

{{/*
The service's container, of dict "root" "component" "values" "port", and what may be left out: "env" and "mounts"
(texts), "imageSuffix", "limits" (a dict).
*/}}
{{- define "cacheclip.container" -}}
name: {{ .component }}
image: {{ include "cacheclip.image" (dict "root" .root "image" .values.image "suffix" .imageSuffix) }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
args:
  - --config
  - /etc/cacheclip/config.toml
  - --log
  - {{ .root.Values.log.filter | quote }}
  - --log-format
  - {{ .root.Values.log.format }}
  {{- range .values.extraArgs }}
  - {{ . | quote }}
  {{- end }}
{{- $traces := include "cacheclip.env.traces" .root }}
{{- if or .env $traces .values.extraEnv }}
env:
  {{- with .env }}
  {{- . | nindent 2 }}
  {{- end }}
  {{- with $traces }}
  {{- . | nindent 2 }}
  {{- end }}
  {{- with .values.extraEnv }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}
ports:
  - name: grpc
    containerPort: {{ .port }}
  - name: metrics
    containerPort: {{ include "cacheclip.port.admin" . }}
{{ include "cacheclip.probes" . }}
lifecycle:
  preStop:
    # Slept by the kubelet: the image needs no shell. Why so long: values.yaml, "How a pod goes away".
    sleep:
      seconds: {{ .values.preStopSeconds }}
resources:
  {{- $resources := deepCopy .values.resources }}
  {{- with .limits }}
  {{- $resources = mergeOverwrite $resources (dict "limits" .) }}
  {{- end }}
  {{- toYaml $resources | nindent 2 }}
securityContext:
  {{- include "cacheclip.containerSecurity" . | nindent 2 }}
volumeMounts:
  - name: config
    mountPath: /etc/cacheclip
    readOnly: true
  {{- with .mounts }}
  {{- . | nindent 2 }}
  {{- end }}
{{- end -}}

{{/* Head of a pod's spec, of dict "root" "values". */}}
{{- define "cacheclip.podHead" -}}
serviceAccountName: {{ include "cacheclip.serviceAccount" .root }}
automountServiceAccountToken: false
# Kubernetes would set CACHECLIP_…_PORT and the like for every Service of the namespace. The services read each
# CACHECLIP_ variable as a field of their configuration and refuse what they do not know.
enableServiceLinks: false
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.terminationGracePeriodSeconds }}
terminationGracePeriodSeconds: {{ . }}
{{- end }}
securityContext:
  {{- include "cacheclip.podSecurity" . | nindent 2 }}
{{- end -}}

{{/* Cores for rayon and the matrix products: what was asked for, and not all that the node has. */}}
{{- define "cacheclip.threads" -}}
- name: RAYON_NUM_THREADS
  valueFrom:
    resourceFieldRef:
      resource: requests.cpu
      divisor: "1"
{{- end -}}

{{/* Where spans go; they tell a service's pods apart. */}}
{{- define "cacheclip.env.traces" -}}
{{- with .Values.traces.endpoint -}}
- name: OTEL_EXPORTER_OTLP_ENDPOINT
  value: {{ . | quote }}
- name: POD_NAME
  valueFrom:
    fieldRef:
      fieldPath: metadata.name
- name: OTEL_RESOURCE_ATTRIBUTES
  value: service.instance.id=$(POD_NAME),service.namespace={{ $.Release.Namespace }}
{{- end -}}
{{- end -}}

{{/* Secrets and what differs from pod to pod come by environment and not by file. */}}
{{- define "cacheclip.env.gateway" -}}
- name: CACHECLIP_SCOPE_SECRET
  valueFrom:
    secretKeyRef:
      name: {{ include "cacheclip.scopeSecret" . }}
      key: {{ .Values.scopeSecret.key }}
{{- end -}}

{{- define "cacheclip.env.cache-store" -}}
{{- $host := include "cacheclip.component" (dict "root" . "component" "cache-store") -}}
- name: CACHECLIP_NODE
  valueFrom:
    fieldRef:
      fieldPath: metadata.name
# The pod's own name behind the headless one: it stays when the pod's address changes.
- name: CACHECLIP_ADVERTISE
  value: http://$(CACHECLIP_NODE).{{ $host }}.{{ .Release.Namespace }}.svc:{{ include "cacheclip.port.cache-store" . }}
{{- with include "cacheclip.redisSecret" . }}
- name: CACHECLIP_INDEX__PASSWORD
  valueFrom:
    secretKeyRef:
      name: {{ . }}
      key: {{ include "cacheclip.redisKey" $ }}
{{- end }}
{{- end -}}

{{/* What NVIDIA's runtime mounts into the container. */}}
{{- define "cacheclip.env.cuda" -}}
- name: NVIDIA_DRIVER_CAPABILITIES
  value: compute,utility
{{- end -}}

{{/* Where a worker keeps the kernels that it compiled: a container that starts again has them. */}}
{{- define "cacheclip.kernels" -}}/var/cache/cuda{{- end -}}
