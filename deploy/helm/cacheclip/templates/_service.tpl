{{/*
A headless service, of dict "root" "component": its name resolves to every ready pod, and callers spread over them
themselves. A pod that drains leaves the name before it stops answering.
*/}}
{{- define "cacheclip.headless" -}}
apiVersion: v1
kind: Service
metadata:
  name: {{ include "cacheclip.component" . }}
  labels:
    {{- include "cacheclip.labels" . | nindent 4 }}
spec:
  clusterIP: None
  selector:
    {{- include "cacheclip.selector" . | nindent 4 }}
  ports:
    - name: grpc
      port: {{ include (printf "cacheclip.port.%s" .component) . }}
      targetPort: grpc
      appProtocol: kubernetes.io/h2c
    - name: metrics
      port: {{ include "cacheclip.port.admin" . }}
      targetPort: metrics
{{- end -}}
