package criu

import (
	"time"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/inventory"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/stats"
)

// PageSize is the unit of pages in images: CRIU writes 4 KiB pages on every
// architecture that stasis knows.
const PageSize = 4096

// DumpStats is what CRIU says about a dump that succeeded.
type DumpStats struct {
	Freezing time.Duration `json:"freezing"` // until all tasks were stopped
	Frozen   time.Duration `json:"frozen"`   // tasks stopped by CRIU
	MemDump  time.Duration `json:"memDump"`  // pages moved into pipes
	MemWrite time.Duration `json:"memWrite"` // pages moved into images

	PagesScanned  uint64 `json:"pagesScanned"`
	PagesWritten  uint64 `json:"pagesWritten"` // private memory
	ShmemWritten  uint64 `json:"shmemWritten"` // pages of shared memory
	PagesInParent uint64 `json:"pagesInParent"`
	PagesLazy     uint64 `json:"pagesLazy"`
}

// ReadDumpStats reads the file stats-dump. CRIU writes it into its work
// directory, which is the image directory unless it was told otherwise.
func ReadDumpStats(dir string) (DumpStats, error) {
	d, err := openImages(dir)
	if err != nil {
		return DumpStats{}, err
	}
	defer d.Close()
	var e stats.StatsEntry
	if err := d.one(&e, "stats-dump", magicService, magicStats); err != nil {
		return DumpStats{}, err
	}
	s := e.GetDump()
	if s == nil {
		return DumpStats{}, d.corrupt("stats-dump", "no statistics of a dump")
	}
	micros := func(n uint32) time.Duration { return time.Duration(n) * time.Microsecond }
	return DumpStats{
		Freezing:      micros(s.GetFreezingTime()),
		Frozen:        micros(s.GetFrozenTime()),
		MemDump:       micros(s.GetMemdumpTime()),
		MemWrite:      micros(s.GetMemwriteTime()),
		PagesScanned:  s.GetPagesScanned(),
		PagesWritten:  s.GetPagesWritten(),
		ShmemWritten:  s.GetShpagesWritten(),
		PagesInParent: s.GetPagesSkippedParent(),
		PagesLazy:     s.GetPagesLazy(),
	}, nil
}

// RestoreStats is what CRIU says about a restore that succeeded.
type RestoreStats struct {
	Forking time.Duration // until all tasks were made
	Restore time.Duration // the whole, until they ran
}

// ReadRestoreStats reads the file stats-restore, which CRIU writes into its work
// directory.
func ReadRestoreStats(dir string) (RestoreStats, error) {
	const name = "stats-restore"
	d, err := openImages(dir)
	if err != nil {
		return RestoreStats{}, err
	}
	defer d.Close()
	var e stats.StatsEntry
	if err := d.one(&e, name, magicService, magicStats); err != nil {
		return RestoreStats{}, err
	}
	s := e.GetRestore()
	if s == nil {
		return RestoreStats{}, d.corrupt(name, "no statistics of a restore")
	}
	return RestoreStats{
		Forking: time.Duration(s.GetForkingTime()) * time.Microsecond,
		Restore: time.Duration(s.GetRestoreTime()) * time.Microsecond,
	}, nil
}

// Inventory is what an image directory says about itself. CRIU's own version
// is not in it: that is recorded in the manifest.
type Inventory struct {
	ImageVersion uint32 `json:"imageVersion"`
	RunID        string `json:"runID,omitempty"`
	LSM          string `json:"lsm"` // "none", "selinux", "apparmor"
	TCPClose     bool   `json:"tcpClose"`
}

// ReadInventory reads inventory.img.
func ReadInventory(imageDir string) (Inventory, error) {
	d, err := openImages(imageDir)
	if err != nil {
		return Inventory{}, err
	}
	defer d.Close()
	return d.inventory()
}

func (d *images) inventory() (Inventory, error) {
	const name = "inventory.img"
	var e inventory.InventoryEntry
	if err := d.one(&e, name, magicInventory); err != nil {
		return Inventory{}, err
	}
	inv := Inventory{
		ImageVersion: e.GetImgVersion(),
		TCPClose:     e.GetTcpClose(),
	}
	switch l := e.GetLsmtype(); l {
	case inventory.Lsmtype_NO_LSM:
		inv.LSM = lsmNone
	case inventory.Lsmtype_SELINUX:
		inv.LSM = lsmSELinux
	case inventory.Lsmtype_APPARMOR:
		inv.LSM = lsmAppArmor
	default:
		return inv, d.corrupt(name, "LSM type %d", l)
	}
	// img_version 2 is CRTOOLS_IMAGES_V1_1, the only one with the heads that
	// are expected of the other files.
	if inv.ImageVersion != 2 {
		return inv, d.corrupt(name, "image version %d, want 2", inv.ImageVersion)
	}
	// dump_criu_run_id, since CRIU 4.2: unknown to go-criu v7.2.0.
	if v, ok := unknownBytes(&e, 13); ok {
		inv.RunID = printable(v)
	}
	return inv, nil
}

const (
	lsmNone     = "none"
	lsmSELinux  = "selinux"
	lsmAppArmor = "apparmor"
)
