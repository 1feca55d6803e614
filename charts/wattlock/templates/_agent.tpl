{{/*
An upgrade that gives the agents another namespace would take the rights from those in the old one and leave them there,
where the operator does not look: holding the nodes, so that no agent of the new namespace could start.
*/}}
{{- define "wattlock.refuseToMoveAgents" -}}
{{- $namespace := include "wattlock.agentNamespace" . -}}
{{- $template := lookup "v1" "ConfigMap" .Release.Namespace (printf "%s-template" (include "wattlock.agentName" .)) -}}
{{- $before := dig "data" "agent-daemonset.yaml" "" $template | fromYaml | dig "metadata" "namespace" $namespace -}}
{{- if ne $before $namespace -}}
{{- range (lookup "apps/v1" "DaemonSet" $before "").items -}}
{{- if and (eq (dig "labels" "app.kubernetes.io/component" "" .metadata) "agent") (eq (dig "labels" "app.kubernetes.io/instance" "" .metadata) ($.Release.Name | trunc 63 | trimSuffix "-")) -}}
{{- fail (printf "agent.namespace cannot change from %q to %q while agents run: DaemonSet %s/%s would stay behind, with its locks. Delete the policies and wait until it is gone (kubectl get daemonset -n %s), then upgrade; or leave agent.namespace at %q" $before $namespace $before .metadata.name $before $before) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/*
The DaemonSet from which the operator makes those that the policies ask for: one for all placements that could select the
same node. It is complete, so that it can be read and checked by itself; what it has to leave to the operator is listed in
its first comment.
*/}}
{{- define "wattlock.agentDaemonSet" -}}
{{- $hostPath := or .Values.simulator.enabled (eq .Values.agent.driver.mode "hostPath") -}}
{{- $driver := .Values.agent.driver.hostPath -}}
{{- if .Values.simulator.enabled -}}
{{- $driver = dict "path" .Values.simulator.directory "mountPath" .Values.simulator.directory "libraryPath" .Values.simulator.directory -}}
{{- end -}}
# The operator fills in, for all placements that could select the same node together:
#   metadata.name                  wattlock-agent- and a hash of the placement, of several the oldest policy's
#   label wattlock.dev/placement   on the DaemonSet, on its pods and in the selector, which it replaces
#   nodeSelector, nodeAffinity     nodes that one of the placements selects
#   tolerations                    of all the placements
#   runtimeClassName               of one of them
#   podAntiAffinity                no agent where one of another DaemonSet has not gone yet
#   WATTLOCK_MODE                  Observe, or Enforce when one of the policies enforces
#   capability SYS_ADMIN           only with Enforce: the driver asks for it before it sets a clock
apiVersion: apps/v1
kind: DaemonSet
metadata:
  name: {{ include "wattlock.agentName" . }}
  namespace: {{ include "wattlock.agentNamespace" . }}
  labels:
    {{- include "wattlock.podLabels" . | nindent 4 }}
    app.kubernetes.io/managed-by: "wattlock-operator"
    app.kubernetes.io/component: "agent"
spec:
  selector:
    matchLabels:
      {{- include "wattlock.selectorLabels" . | nindent 6 }}
      app.kubernetes.io/component: "agent"
  # An agent takes its locks back when it stops, so all may be replaced at once.
  updateStrategy:
    type: RollingUpdate
    rollingUpdate:
      maxUnavailable: "100%"
  template:
    metadata:
      labels:
        {{- with .Values.agent.podLabels }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
        {{- include "wattlock.podLabels" . | nindent 8 }}
        app.kubernetes.io/component: "agent"
      {{- if or .Values.metrics.scrapeAnnotations .Values.agent.podAnnotations }}
      annotations:
        {{- with .Values.agent.podAnnotations }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
        {{- if .Values.metrics.scrapeAnnotations }}
        {{- include "wattlock.scrapeAnnotations" "9400" | nindent 8 }}
        {{- end }}
      {{- end }}
    spec:
      serviceAccountName: {{ include "wattlock.agentName" . }}
      automountServiceAccountToken: true
      # Enough to release every GPU and to report it.
      terminationGracePeriodSeconds: 30
      hostNetwork: false
      hostPID: false
      hostIPC: false
      {{- with .Values.agent.priorityClassName }}
      priorityClassName: {{ . | quote }}
      {{- end }}
      {{- with .Values.image.pullSecrets }}
      imagePullSecrets:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      # An open NVML handle keeps the driver from being replaced. NVIDIA's GPU operator asks its clients to leave a node
      # by changing this label from "true" to a paused value.
      affinity:
        nodeAffinity:
          requiredDuringSchedulingIgnoredDuringExecution:
            nodeSelectorTerms:
              - matchExpressions:
                  - {key: nvidia.com/gpu.deploy.client, operator: DoesNotExist}
              - matchExpressions:
                  - {key: nvidia.com/gpu.deploy.client, operator: In, values: ["true"]}
      securityContext:
        # The folder of the kubelet's socket belongs to root, and an added capability takes effect for root only.
        runAsUser: 0
        runAsGroup: 0
        seccompProfile:
          type: RuntimeDefault
      containers:
        - name: agent
          image: {{ include "wattlock.image" (list . .Values.agent.image) }}
          imagePullPolicy: {{ .Values.image.pullPolicy }}
          args: ["run"]
          env:
            - name: NODE_NAME
              valueFrom: {fieldRef: {fieldPath: spec.nodeName}}
            - name: POD_NAME
              valueFrom: {fieldRef: {fieldPath: metadata.name}}
            # Where the operator's lease is.
            - name: WATTLOCK_NAMESPACE
              value: {{ .Release.Namespace | quote }}
            - name: WATTLOCK_STATE_DIR
              value: /var/lib/wattlock
            - name: WATTLOCK_STALE_ORDERS_SECONDS
              value: {{ int .Values.agent.staleOrdersSeconds | quote }}
            {{- if .Values.simulator.enabled }}
            # Simulated nodes may share a kernel, and reboot on their own.
            - name: WATTLOCK_BOOT_ID_FILE
              value: {{ printf "%s/boot_id" .Values.simulator.directory | quote }}
            {{- end }}
            {{- if $hostPath }}
            - name: LD_LIBRARY_PATH
              value: {{ $driver.libraryPath | quote }}
            {{- else }}
            # NVIDIA's container runtime reads these two. "all" is no request for a GPU: it only makes them visible.
            - name: NVIDIA_VISIBLE_DEVICES
              value: all
            - name: NVIDIA_DRIVER_CAPABILITIES
              value: utility
            {{- end }}
            {{- with .Values.agent.extraEnv }}
            {{- toYaml . | nindent 12 }}
            {{- end }}
          ports:
            - {name: metrics, containerPort: 9400, protocol: TCP}
          livenessProbe:
            httpGet: {path: /healthz, port: metrics}
            initialDelaySeconds: 10
            periodSeconds: 10
            timeoutSeconds: 5
            failureThreshold: 3
          readinessProbe:
            httpGet: {path: /readyz, port: metrics}
            periodSeconds: 5
            timeoutSeconds: 5
            failureThreshold: 2
          resources:
            {{- toYaml .Values.agent.resources | nindent 12 }}
          securityContext:
            privileged: false
            allowPrivilegeEscalation: false
            readOnlyRootFilesystem: true
            capabilities:
              drop: ["ALL"]
          volumeMounts:
            - {name: state, mountPath: /var/lib/wattlock}
            - {name: pod-resources, mountPath: /var/lib/kubelet/pod-resources, readOnly: true}
            {{- if $hostPath }}
            # The simulated driver keeps its state beside the library, a real one is only read.
            - {name: driver, mountPath: {{ $driver.mountPath | quote }}, readOnly: {{ not .Values.simulator.enabled }}}
            {{- end }}
      volumes:
        # The journal outlives the pod: it tells the next agent which locks to undo.
        - name: state
          hostPath: {path: {{ .Values.agent.stateDirectory | quote }}, type: DirectoryOrCreate}
        - name: pod-resources
          hostPath: {path: {{ .Values.agent.podResourcesDirectory | quote }}, type: Directory}
        {{- if $hostPath }}
        - name: driver
          hostPath: {path: {{ $driver.path | quote }}, type: {{ ternary "DirectoryOrCreate" "Directory" .Values.simulator.enabled }}}
        {{- end }}
{{- end -}}
