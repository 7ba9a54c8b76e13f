{{/* What all alerts have in common. */}}

{{/* Matchers of one component's series, of dict "root" "component": the labels that the ServiceMonitor gives. */}}
{{- define "cacheclip.series" -}}
namespace="{{ .root.Release.Namespace }}", job="{{ include "cacheclip.component" . }}"
{{- end -}}

{{/* Matchers of the whole release. */}}
{{- define "cacheclip.series.all" -}}
{{- $components := "gateway|gpu-worker|aux-scorer|cache-store" -}}
namespace="{{ .Release.Namespace }}", job=~"{{ include "cacheclip.fullname" . }}-({{ $components }})"
{{- end -}}

{{/* Labels of an alert, of dict "root" "severity": sums have lost the namespace, and routes go by it. */}}
{{- define "cacheclip.alert.labels" -}}
{ severity: {{ .severity }}, namespace: {{ .root.Release.Namespace }} }
{{- end -}}
