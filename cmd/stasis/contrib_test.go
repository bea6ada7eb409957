package main

import (
	"bytes"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
)

const contrib = "../../contrib"

// unitFile is section, key and values of a systemd unit; a key may be repeated.
func unitFile(t *testing.T, name string) map[string][]string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(contrib, "systemd", name))
	if err != nil {
		t.Fatal(err)
	}
	unit, section := map[string][]string{}, ""
	for _, line := range strings.Split(string(b), "\n") {
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		if strings.HasPrefix(line, "[") {
			section = strings.Trim(line, "[]")
			continue
		}
		key, value, ok := strings.Cut(line, "=")
		if !ok || section == "" {
			t.Fatalf("%s: %q", name, line)
		}
		unit[section+"."+key] = append(unit[section+"."+key], strings.Fields(value)...)
	}
	return unit
}

// TestUnits: at a shutdown systemd stops the kubelet, then dumps, then stops the
// rest; and what the unit runs is a command that there is.
func TestUnits(t *testing.T) {
	u := unitFile(t, prepareUnit)
	for key, want := range map[string]string{
		"Unit.After": "containerd.service stasisd.service", "Unit.Before": "kubelet.service", "Service.Type": "oneshot",
		"Service.RemainAfterExit": "yes", "Service.TimeoutStopSec": "300", "Install.WantedBy": "multi-user.target",
	} {
		if got := strings.Join(u[key], " "); got != want {
			t.Errorf("%s=%s, want %s", key, got, want)
		}
	}
	stop := strings.Join(u["Service.ExecStop"], " ")
	i := strings.Index(stop, "/usr/local/bin/stasis ")
	if i < 0 || !strings.Contains(stop[:i], "is-system-running") {
		t.Fatalf("ExecStop=%s", stop)
	}
	var args []string
	for _, a := range strings.Fields(strings.TrimSuffix(stop[i:], "'"))[1:] {
		if !strings.HasPrefix(a, "$") {
			args = append(args, a)
		}
	}
	c := &cli{terminal: terminal{strings.NewReader(""), io.Discard, io.Discard}}
	cmd, rest, err := c.command().Find(args)
	if err == nil {
		err = cmd.ParseFlags(rest)
	}
	if err != nil || cmd.Name() != "prepare-reboot" || cmd.Flag("best-effort").Value.String() != "true" || cmd.Flag("kill").Value.String() != "true" || cmd.Flag("timeout").Value.String() != "4m40s" {
		t.Errorf("%q: %v, %v", args, cmd.Name(), err)
	}
	if d := unitFile(t, "stasisd.service"); !slices.Contains(d["Service.ExecStart"], "--inhibit-shutdown") || strings.Join(d["Unit.Before"], " ") != "kubelet.service" {
		t.Errorf("stasisd: %v", d)
	}
	// A unit that is Before another is stopped after it.
	if s := unitFile(t, "cri-containerd-.scope.d/stasis.conf"); strings.Join(s["Unit.Before"], " ") != prepareUnit {
		t.Errorf("scopes: %v", s)
	}
	if l := unitFile(t, "logind-stasis.conf"); strings.Join(l["Login.InhibitDelayMaxSec"], "") != "300" {
		t.Errorf("logind: %v", l)
	}
}

// TestStopOfUnit runs the unit's command with a systemctl of our own.
func TestStopOfUnit(t *testing.T) {
	stop := strings.Join(unitFile(t, prepareUnit)["Service.ExecStop"], " ")
	script, ok := strings.CutPrefix(stop, "/bin/sh -c ")
	if !ok {
		t.Fatal(stop)
	}
	script = strings.ReplaceAll(strings.Trim(script, "'"), "$$", "$") // as systemd does
	dir := t.TempDir()
	script = strings.ReplaceAll(script, "/usr/local/bin/stasis", filepath.Join(dir, "stasis"))
	writeFile(t, filepath.Join(dir, "stasis"), "#!/bin/sh\necho ran $*\n", 0o755)
	for state, want := range map[string]string{"running": "", "degraded": "", "maintenance": "", "starting": "",
		"stopping": "ran prepare-reboot --best-effort --kill --timeout 280s --kubelet-unit k3s.service\n"} {
		writeFile(t, filepath.Join(dir, "systemctl"), "#!/bin/sh\necho "+state+"\nexit 1\n", 0o755)
		cmd := exec.Command("/bin/sh", "-c", script)
		cmd.Env = []string{"PATH=" + dir + ":" + os.Getenv("PATH"), "STASIS_PREPARE_OPTIONS=--kubelet-unit k3s.service"}
		if out, err := cmd.CombinedOutput(); err != nil || string(out) != want {
			t.Errorf("%s: %q, %v; want %q", state, out, err, want)
		}
	}
}

// daemonSet is as much of apps/v1 as the manifest uses.
type daemonSet struct {
	APIVersion string `yaml:"apiVersion"`
	Kind       string
	Metadata   objectMeta
	Spec       struct {
		Selector struct {
			MatchLabels map[string]string `yaml:"matchLabels"`
		}
		Template struct {
			Metadata objectMeta
			Spec     struct {
				NodeSelector   map[string]string `yaml:"nodeSelector"`
				Automount      *bool             `yaml:"automountServiceAccountToken"`
				HostPID        bool              `yaml:"hostPID"`
				InitContainers []container       `yaml:"initContainers"`
				Containers     []container
				Volumes        []struct {
					Name     string
					HostPath struct{ Path, Type string } `yaml:"hostPath"`
				}
			}
		}
	}
}

type objectMeta struct {
	Name   string
	Labels map[string]string
}

type container struct {
	Name, Image     string
	Command         []string
	Resources       struct{ Requests, Limits map[string]string }
	SecurityContext struct {
		Privileged               bool
		AllowPrivilegeEscalation *bool `yaml:"allowPrivilegeEscalation"`
		ReadOnlyRootFilesystem   bool  `yaml:"readOnlyRootFilesystem"`
		Capabilities             struct{ Drop []string }
	} `yaml:"securityContext"`
	VolumeMounts []struct {
		Name      string
		MountPath string `yaml:"mountPath"`
	} `yaml:"volumeMounts"`
}

type kustomization struct {
	APIVersion string `yaml:"apiVersion"`
	Kind       string
	Namespace  string
	Resources  []string
	Images     []struct {
		Name   string
		NewTag string `yaml:"newTag"`
	}
}

func strictYAML(t *testing.T, path string, into any) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	d := yaml.NewDecoder(bytes.NewReader(b))
	d.KnownFields(true)
	if err := d.Decode(into); err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	if err := d.Decode(new(any)); err != io.EOF {
		t.Errorf("%s: more than one document", path)
	}
}

func TestKustomizeNode(t *testing.T) {
	dir := filepath.Join(contrib, "kubernetes/node")
	var k kustomization
	strictYAML(t, filepath.Join(dir, "kustomization.yaml"), &k)
	if k.APIVersion != "kustomize.config.k8s.io/v1beta1" || k.Kind != "Kustomization" || !slices.Equal(k.Resources, []string{"daemonset.yaml"}) || len(k.Images) != 1 {
		t.Errorf("%+v", k)
	}
	var ds daemonSet
	strictYAML(t, filepath.Join(dir, k.Resources[0]), &ds)
	pod := ds.Spec.Template.Spec
	if ds.APIVersion != "apps/v1" || ds.Kind != "DaemonSet" || ds.Metadata.Name == "" || len(pod.InitContainers) != 1 || len(pod.Containers) != 1 {
		t.Fatalf("%+v", ds)
	}
	for key, v := range ds.Spec.Selector.MatchLabels {
		if ds.Spec.Template.Metadata.Labels[key] != v {
			t.Errorf("the selector does not match the template: %s", key)
		}
	}
	// Not the label that places pods: they would come before containerd knows them.
	if pod.NodeSelector["stasis.dev/install"] != "true" || pod.NodeSelector["stasis.dev/node"] != "" {
		t.Errorf("node selector %v", pod.NodeSelector)
	}
	install, rest := pod.InitContainers[0], pod.Containers[0]
	if install.Image != k.Images[0].Name || rest.Image != install.Image || !install.SecurityContext.Privileged || !pod.HostPID || rest.SecurityContext.Privileged {
		t.Errorf("%+v\n%+v", install, rest)
	}
	paths := map[string]string{}
	for _, v := range pod.Volumes {
		paths[v.Name] = v.HostPath.Path
	}
	for _, m := range install.VolumeMounts {
		if m.MountPath != install.Command[1]+paths[m.Name] {
			t.Errorf("%s is mounted at %s", paths[m.Name], m.MountPath)
		}
		delete(paths, m.Name)
	}
	if len(paths) > 0 {
		t.Errorf("volumes without a mount: %v", paths)
	}
}

// TestInstallScript fills the image's directory by the Dockerfile and runs the
// script on a node in a directory.
func TestInstallScript(t *testing.T) {
	image, host := t.TempDir(), t.TempDir()
	script := ""
	b, err := os.ReadFile(filepath.Join(contrib, "kubernetes/node/Dockerfile"))
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range strings.Split(string(b), "\n") {
		f := strings.Fields(line)
		if len(f) < 3 || f[0] != "COPY" {
			continue
		}
		f = slices.DeleteFunc(f[1:], func(s string) bool { return strings.HasPrefix(s, "--") })
		to := filepath.Join(image, strings.TrimPrefix(f[len(f)-1], "/stasis"))
		for _, from := range f[:len(f)-1] {
			name := to
			if strings.HasSuffix(f[len(f)-1], "/") {
				name = filepath.Join(to, filepath.Base(from))
			}
			if strings.HasPrefix(from, "bin/") { // need not be built
				writeFile(t, name, from, 0o755)
				continue
			}
			if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
				t.Fatal(err)
			}
			copyFile(t, filepath.Join("../..", from), name)
			if filepath.Base(from) == "install" {
				script = name
			}
		}
	}
	for _, dir := range []string{"usr/local/bin", "etc/systemd/system", "etc/systemd/logind.conf.d", "etc/containerd/conf.d"} {
		if err := os.MkdirAll(filepath.Join(host, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 {
		cmd := exec.Command("/bin/sh", script, host)
		cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "STASIS_FROM=" + image, "STASIS_SYSTEMCTL=echo systemctl"}
		out, err := cmd.CombinedOutput()
		if err != nil || !strings.Contains(string(out), "systemctl enable --now stasisd.service stasis-prepare-reboot.service") {
			t.Fatalf("%v\n%s", err, out)
		}
		// What the operator changed there stays.
		own := filepath.Join(host, "etc/containerd/conf.d/stasis.toml")
		if b, err := os.ReadFile(own); err != nil || len(b) == 0 {
			t.Errorf("%s: %v", own, err)
		}
		writeFile(t, own, "# mine\n", 0o644)
	}
	if b, err := os.ReadFile(filepath.Join(host, "etc/containerd/conf.d/stasis.toml")); err != nil || string(b) != "# mine\n" {
		t.Errorf("%q, %v", b, err)
	}
	for name, mode := range map[string]os.FileMode{
		"usr/local/bin/stasis": 0o755, "usr/local/bin/stasisd": 0o755, "usr/local/bin/containerd-shim-stasis-v2": 0o755,
		"etc/systemd/system/stasisd.service": 0o644, "etc/systemd/system/" + prepareUnit: 0o644, "etc/systemd/logind.conf.d/stasis.conf": 0o644,
		"etc/systemd/system/cri-containerd-.scope.d/stasis.conf": 0o644,
	} {
		if fi, err := os.Stat(filepath.Join(host, name)); err != nil || fi.Mode().Perm() != mode {
			t.Errorf("%s: %v, %v", name, fi, err)
		}
	}
	if left, err := filepath.Glob(filepath.Join(host, "*/*/*.new")); err != nil || len(left) > 0 {
		t.Errorf("left over: %v", left)
	}
}
