package shim

import (
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
)

func TestUnmappable(t *testing.T) {
	plain := &specs.Spec{Process: &specs.Process{}, Linux: &specs.Linux{}}
	process := func(p specs.Process) *specs.Spec { return &specs.Spec{Process: &p, Linux: &specs.Linux{}} }
	for _, tt := range []struct {
		name     string
		template string
		policy   checkpoint.Policy
		images   int64 // MiB
		spec     *specs.Spec
		want     string // part of the reason
	}{
		{"of a template", "web", checkpoint.PolicyTemplate, 32, plain, ""},
		{"of its own", "", checkpoint.PolicyTemplate, 32, plain, "not from a template"},
		{"to be dumped at a stop", "web", checkpoint.PolicyResume, 32, plain, "policy is resume"},
		{"to be dumped at a reboot", "web", checkpoint.PolicyReboot, 32, plain, "policy is reboot"},
		{"little", "web", checkpoint.PolicyTemplate, 31, plain, "no more than 31 MiB"},
		{"user namespace", "web", checkpoint.PolicyTemplate, 32,
			&specs.Spec{Linux: &specs.Linux{Namespaces: []specs.LinuxNamespace{{Type: specs.PIDNamespace}, {Type: specs.UserNamespace}}}}, "user namespace"},
		{"SELinux", "web", checkpoint.PolicyTemplate, 32, process(specs.Process{SelinuxLabel: "system_u:system_r:container_t:s0:c1,c2"}), "SELinux"},
		{"containerd's AppArmor", "web", checkpoint.PolicyTemplate, 32, process(specs.Process{ApparmorProfile: "cri-containerd.apparmor.d"}), ""},
		{"that and SELinux", "web", checkpoint.PolicyTemplate, 32, process(specs.Process{ApparmorProfile: "unconfined", SelinuxLabel: "a:b:c:s0"}), "SELinux"},
		{"AppArmor of its own", "web", checkpoint.PolicyTemplate, 32, process(specs.Process{ApparmorProfile: "strict"}), "AppArmor"},
	} {
		c := newContainer("c")
		c.spec, c.settings.Policy = tt.spec, tt.policy
		m := &checkpoint.Manifest{Template: tt.template, Files: []checkpoint.File{{Path: "checkpoint/pages-1.img", SizeBytes: tt.images << 20}}}
		got := ""
		if err := unmappable(m, c); err != nil {
			got = err.Error()
		}
		if !strings.Contains(got, tt.want) || got != "" && tt.want == "" {
			t.Errorf("%s: %q, want %q", tt.name, got, tt.want)
		}
	}
}
