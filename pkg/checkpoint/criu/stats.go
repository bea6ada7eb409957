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
	s, err := readStats(dir, "stats-dump", (*stats.StatsEntry).GetDump)
	if err != nil {
		return DumpStats{}, err
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

// ReadRestoreTime reads the file stats-restore, which CRIU writes into its work
// directory, for how long the restore took, until the tasks ran.
func ReadRestoreTime(dir string) (time.Duration, error) {
	s, err := readStats(dir, "stats-restore", (*stats.StatsEntry).GetRestore)
	if err != nil {
		return 0, err
	}
	return time.Duration(s.GetRestoreTime()) * time.Microsecond, nil
}

// readStats reads one of CRIU's files of statistics; of returns those of the kind
// that the file is to have.
func readStats[S any](dir, name string, of func(*stats.StatsEntry) *S) (*S, error) {
	d, err := openImages(dir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	var e stats.StatsEntry
	if err := d.one(&e, name, magicService, magicStats); err != nil {
		return nil, err
	}
	s := of(&e)
	if s == nil {
		return nil, d.corrupt(name, "no statistics of this kind")
	}
	return s, nil
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
