{{/* Replicas: how many, and how many may be away. */}}

{{/*
Of dict "root" "component" "values". maxUnavailable and not minAvailable: with one replica, the latter would keep a node
from ever being drained.
*/}}
{{- define "cacheclip.pdb" -}}
{{- if .values.podDisruptionBudget.enabled }}
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  name: {{ include "cacheclip.component" . }}
  labels:
    {{- include "cacheclip.labels" . | nindent 4 }}
spec:
  maxUnavailable: {{ .values.podDisruptionBudget.maxUnavailable }}
  # A pod that is not ready anyway does not stand in a drain's way.
  unhealthyPodEvictionPolicy: AlwaysAllow
  selector:
    matchLabels:
      {{- include "cacheclip.selector" . | nindent 6 }}
{{- end }}
{{- end -}}

{{/*
Of dict "root" "component" "values". The metric is one of the pod's own and reaches the autoscaler through an adapter
for the custom metrics API, which must serve it per pod.
*/}}
{{- define "cacheclip.hpa" -}}
{{- with .values.autoscaling }}
{{- if .enabled }}
apiVersion: autoscaling/v2
kind: HorizontalPodAutoscaler
metadata:
  name: {{ include "cacheclip.component" $ }}
  labels:
    {{- include "cacheclip.labels" $ | nindent 4 }}
spec:
  scaleTargetRef:
    apiVersion: apps/v1
    kind: Deployment
    name: {{ include "cacheclip.component" $ }}
  minReplicas: {{ .minReplicas }}
  maxReplicas: {{ .maxReplicas }}
  metrics:
    - type: Pods
      pods:
        metric:
          name: {{ .metric | quote }}
        target:
          type: AverageValue
          averageValue: {{ .averageValue | quote }}
  behavior:
    scaleDown:
      stabilizationWindowSeconds: {{ .scaleDownStabilizationSeconds }}
{{- end }}
{{- end }}
{{- end -}}
